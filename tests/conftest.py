"""Fixtures for every test."""

from tests.netlab.fixtures import netlab
from tests.support.fixtures import random_model, start_node

__all__ = ["netlab", "random_model", "start_node"]
