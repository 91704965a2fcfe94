"""The nouns: problem, layout, target, cost, faults, incidents, counters, env, errors. Standard library and PyTorch only; no I/O, no launch."""
