"""Hostile cases and the tolerance rule, public so that third-party backends inherit them.

`cases` draws operands, `budget` judges results, `families` says what the numbers look like, `mutants` proves that
the rule sees defects.
"""
