"""The nouns: problem, layout, target, cost, faults, env, errors. Standard library and PyTorch only; no I/O, no launch."""
