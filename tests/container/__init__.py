"""Executes the Containerfile without a container engine: `make container`."""
