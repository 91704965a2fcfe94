"""The PyTorch backend: every operation, every layout, every device."""

from openmla.backends.torch.kernels import DECODE, KERNELS, PREFILL, SPARSE_DECODE, SPARSE_PREFILL

__all__ = ["DECODE", "KERNELS", "PREFILL", "SPARSE_DECODE", "SPARSE_PREFILL"]
