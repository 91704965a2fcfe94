"""Portable kernels in Triton, on NVIDIA, AMD and in the interpreter: attention over caches, and writing them."""

from openmla.backends.triton.kernels import APPEND, DECODE, KERNELS, PREFILL, SPARSE_DECODE, SPARSE_PREFILL

__all__ = ["APPEND", "DECODE", "KERNELS", "PREFILL", "SPARSE_DECODE", "SPARSE_PREFILL"]
