"""Fixtures for every test."""

from tests.netlab.fixtures import netlab

__all__ = ["netlab"]
