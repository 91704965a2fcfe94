"""Portable kernels in Triton: dense decode, sparse decode and sparse prefill on NVIDIA, AMD and in the interpreter."""

from openmla.backends.triton.kernels import DECODE, KERNELS, PREFILL, SPARSE_DECODE, SPARSE_PREFILL

__all__ = ["DECODE", "KERNELS", "PREFILL", "SPARSE_DECODE", "SPARSE_PREFILL"]
