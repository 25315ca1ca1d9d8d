"""Fixtures for every test."""

import os
import signal
import sys

import pytest
from hypothesis import HealthCheck, settings
from tests.netlab.fixtures import netlab
from tests.support.examples import FAST, FEW
from tests.support.fixtures import random_model, start_node
from tests.support.order import long_first
from tools.isolate import enter_namespace

__all__ = ["netlab", "random_model", "start_node"]

# The same as in the Makefile, for who runs pytest alone: nodes that tests start find everything compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# Two cores that others use as well: how long an example takes says nothing about the code under test.
settings.register_profile("mesh-llm", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile(FAST, parent=settings.get_profile("mesh-llm"), max_examples=FEW)
settings.load_profile("mesh-llm")

# A run in the background of a shell that ignores Ctrl-C, or under nohup, hands that down to every child, and nodes
# respect it: none would stop, or read its configuration again, when a test sends it the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
if sys.platform != "win32":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure() -> None:
    """Give each of several workers a network of its own: tests may then take the ports that users' nodes take."""
    if "PYTEST_XDIST_WORKER" in os.environ and sys.platform == "linux":
        reason = enter_namespace()
        if reason is not None:
            raise pytest.UsageError(f"no network namespace for a worker ({reason}): run with JOBS=0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have several workers begin with what takes long."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        items[:] = long_first(items, workers)
