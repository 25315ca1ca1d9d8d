"""Checks every request before it reaches an rpc-server."""
