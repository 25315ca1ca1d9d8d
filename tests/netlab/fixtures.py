"""The `netlab` fixture: a factory of labs that are closed at the end of the test."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.netlab.lab import NetLab, unavailable_reason

NetLabFactory = Callable[..., NetLab]
"""Takes the arguments of `NetLab` and gives an open lab."""


@pytest.fixture
def netlab() -> Iterator[NetLabFactory]:
    """`lab = netlab(3, delay_ms=20)`: an open lab. Skips where labs cannot run, and only there."""
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as labs:
        yield lambda *arguments, **settings: labs.enter_context(NetLab(*arguments, **settings))
