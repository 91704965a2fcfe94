"""The PyTorch backend: every operation, every layout, every device."""

from openmla.backends.torch.kernels import APPEND, DECODE, KERNELS, PREFILL, SPARSE_DECODE, SPARSE_PREFILL

__all__ = ["APPEND", "DECODE", "KERNELS", "PREFILL", "SPARSE_DECODE", "SPARSE_PREFILL"]
