"""The two physical forms of a shard: Zarr and WebDataset."""
