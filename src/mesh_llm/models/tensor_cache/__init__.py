"""Tensors by content: digests of those on disk, and a cache of those that other nodes sent."""
