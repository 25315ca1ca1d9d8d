"""Models on this machine's disk."""
