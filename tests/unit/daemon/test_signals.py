import asyncio
import os
import signal
import sys

import pytest

from mesh_llm.daemon.log import Signals


async def test_the_first_signal_asks_and_handlers_are_removed() -> None:
    asked = asyncio.Event()
    with Signals(asked.set, lambda: None) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(asked.wait(), 5.0)
        assert signals.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(lambda: None, lambda: None) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
            assert signals.number == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


_TWICE = """
import asyncio, os, signal
from mesh_llm.daemon.log import Signals
async def main():
    with Signals(lambda: os.kill(os.getpid(), signal.SIGINT), lambda: print("last words", flush=True)):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
async def test_the_second_signal_ends_the_process() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _TWICE, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 20.0)
    assert (process.returncode, output) == (128 + signal.SIGINT, b"last words\n")
