"""Shards on disk, the order of samples, and the batches made of them."""
