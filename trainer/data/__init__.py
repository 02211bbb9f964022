"""Data of a run: the order of groups, the stream of batches, and random numbers."""
