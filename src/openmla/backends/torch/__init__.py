"""The PyTorch backend: every operation, every layout, every device."""

from openmla.backends.torch.fused import PrefillCuDNN
from openmla.backends.torch.kernels import APPEND, DECODE, KERNELS, PREFILL, SPARSE_DECODE, SPARSE_PREFILL

PREFILL_CUDNN = PrefillCuDNN()

__all__ = ["APPEND", "DECODE", "KERNELS", "PREFILL", "PREFILL_CUDNN", "SPARSE_DECODE", "SPARSE_PREFILL"]
