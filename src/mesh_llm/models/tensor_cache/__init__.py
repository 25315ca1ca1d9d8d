"""Tensors by content: digests, and the store of what other nodes sent."""
