"""Sparse decode over long lists: keys are converted in registers, as A of every product."""
