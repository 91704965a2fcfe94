"""The PyTorch backend: every operation, every layout, every device."""

from openmla.backends.torch.fused import PrefillCuDNN, PrefillFlash3
from openmla.backends.torch.kernels import APPEND, DECODE, KERNELS, PREFILL, SPARSE_DECODE, SPARSE_PREFILL

PREFILL_CUDNN, PREFILL_FLASH3 = PrefillCuDNN(), PrefillFlash3()

__all__ = [
    "APPEND",
    "DECODE",
    "KERNELS",
    "PREFILL",
    "PREFILL_CUDNN",
    "PREFILL_FLASH3",
    "SPARSE_DECODE",
    "SPARSE_PREFILL",
]
