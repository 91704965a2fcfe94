"""Portable kernels in Triton: none is built yet; `openmla explain` says so."""
