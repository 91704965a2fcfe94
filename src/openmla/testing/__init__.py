"""Hostile cases and the tolerance rule, public so that third-party backends inherit them.

`cases` draws operands, `budget` judges results, `families` says what the numbers look like, `mutants` proves that
the rule sees defects, `coverage` calls dense decode in every way at the sizes of real kernels.
"""
