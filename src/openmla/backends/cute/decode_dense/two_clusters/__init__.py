"""Dense decode where several clusters of two read the same keys: a ring of 11 slots."""
