"""The short form of `make chaos`: the command itself, for some twenty seconds."""

import sys
from pathlib import Path

import pytest
from tests.netlab.lab import unavailable_reason
from tests.support.process import Process

_ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(300)
@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
async def test_a_short_storm_loses_nothing() -> None:
    argv = [sys.executable, "-m", "tests.chaos", "--short", "--seed", "7"]
    async with await Process.start(argv, cwd=_ROOT, name="chaos") as storm:
        status = await storm.ended(280)
        print(storm.text)
        assert status == 0, storm.text[-6000:]
