"""Prompt caches of slots on disk: encrypted and authenticated with a key of this node's own, and bounded in size."""
