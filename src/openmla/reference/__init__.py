"""The oracle: what every kernel must compute, written to be read. fp64, fp32 or emulated low precision."""
