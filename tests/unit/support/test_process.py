"""Programs under test, with small scripts in the place of nodes."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator

import psutil
import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.process import EndedEarlyError, Process

# Starts a child in a session of its own, says its pid, and ends when told to: without the child.
PARENT = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import signal; print('child', flush=True); signal.pause()"],
                         start_new_session=True)
print("parent of", child.pid, flush=True)
signal.sigwait([signal.SIGTERM])
"""


def python(script: str) -> list[str]:
    return [sys.executable, "-c", "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [15])\n" + script]


@pytest.fixture
async def parent() -> AsyncGenerator[Process]:
    async with await Process.start(python(PARENT), name="parent") as process:
        await process.line("^child$")
        yield process


async def test_lines_are_waited_for_and_kept() -> None:
    script = "import sys; print('one'); print('two', file=sys.stderr, flush=True); print('last', end='')"
    async with await Process.start([sys.executable, "-u", "-c", script]) as process:
        assert (await process.line(r"^(t)wo")).group(1) == "t"
        assert await process.ended() == 0
        await process.line("last")
        assert process.lines == ["one", "two", "last"]
        with pytest.raises(EndedEarlyError, match="ended with 0 before it said 'one'"):
            await process.line("one", after=1)


async def test_the_failure_shows_how_it_ended_and_what_it_said() -> None:
    async with await Process.start([sys.executable, "-c", "print('no disk'); exit(3)"], name="node x") as process:
        with pytest.raises(EndedEarlyError, match=r"node x ended with 3 before it said 'ready'.*\n  \| no disk"):
            await process.line("ready")


async def test_waiting_has_a_deadline() -> None:
    async with await Process.start([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        with pytest.raises(AssertionError, match=r"0\.05 s passed before .* says 'ready'"):
            await process.line("ready", timeout=0.05)
        with pytest.raises(AssertionError, match=r"0\.05 s passed before .* ends"):
            await process.ended(timeout=0.05)


async def test_several_may_wait_at_once_and_one_may_give_up(parent: Process) -> None:
    async def impatient() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(parent.line("never"), 0.05)
        parent.signal(signal.SIGTERM)

    async with asyncio.TaskGroup() as group:
        patient = group.create_task(parent.ended())
        group.create_task(impatient())
    assert patient.result() == 0


async def test_the_family_outlives_the_parent_and_is_named(parent: Process) -> None:
    assert len(parent.family()) == 2
    parent.signal(signal.SIGTERM)
    assert await parent.ended() == 0
    (child,) = parent.family()
    with pytest.raises(AssertionError, match=rf"parent left running: .*signal\.pause.*\({child.pid}\)"):
        await parent.gone(timeout=0.05)
    child.kill()
    await parent.gone()


async def test_what_is_frozen_does_nothing_until_it_is_thawed(parent: Process) -> None:
    parent.freeze()
    parent.signal(signal.SIGTERM)
    with pytest.raises(AssertionError, match="passed before parent ends"):
        await parent.ended(timeout=0.1)
    parent.thaw()
    assert await parent.ended() == 0


async def test_close_ends_everything_even_what_is_frozen(parent: Process) -> None:
    family = parent.family()
    parent.freeze()
    await parent.close()
    assert parent.status == -signal.SIGKILL
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family)
    await parent.close()


async def test_on_a_labs_host_it_keeps_its_pid(netlab: NetLabFactory) -> None:
    lab = netlab(2)
    script = "import os; print(os.getpid(), os.stat('/proc/self/ns/net').st_ino, flush=True); os.kill(os.getpid(), 19)"
    async with await Process.start([sys.executable, "-c", script], lab=lab, host=1) as process:
        match = await process.line(r"(\d+) (\d+)")
        assert int(match[1]) == process.pid
        assert int(match[2]) != os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
        assert lab.processes(1) == {process.pid}
        assert lab.processes(0) == set()
