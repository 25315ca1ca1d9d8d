"""Keeps an RPC server to what it needs: which calls it may make, which files it may open, who can connect to it."""
