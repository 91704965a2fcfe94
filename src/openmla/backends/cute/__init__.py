"""Hopper kernels in CuTe DSL: compiled without a GPU, shipped as small shared libraries."""
