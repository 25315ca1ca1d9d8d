"""No engine outlives the daemon, and every end is told with its reason."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from tests.integration.engine_fixtures import (
    Model,
    client_of,
    embedded,
    has_ended,
    is_open,
    logged,
    model,
    small_spec,
    started,
    supervisor,
)

from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.engine.process import Child, Command, python_module
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Exit, RunningEngine, Supervisor
from mesh_llm.runtime.supervision import TaskScope

__all__ = ["embedded", "model", "supervisor"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="waits for processes by pidfd")

GUARD = Path(python_module("x")[1]["PYTHONPATH"].split(os.pathsep)[0]) / "mesh_llm" / "engine" / "guard.py"

# A daemon in miniature: starts an engine, says where, and would serve for ever.
_DAEMON = """
import asyncio, sys
from pathlib import Path
from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import Supervisor

async def main():
    source = EmbeddedSource.find(Path(sys.argv[2]))
    supervisor = Supervisor(Path(sys.argv[2]))
    spec = EngineSpec(model=Path(sys.argv[1]), alias="m", context=256, slots=1)
    engine = await supervisor.launch(await supervisor.server_command(source, spec), "m")
    if sys.argv[3] == "ready":
        print(engine.pid, (await engine.ready()).address, flush=True)
    else:
        print(engine.pid, "-", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def start_daemon(model: Path, home: Path, until: str) -> tuple[asyncio.subprocess.Process, int, str]:
    (argv, env) = python_module("unused")
    process = await asyncio.create_subprocess_exec(
        *(argv[0], "-P", "-c", _DAEMON, str(model), str(home), until),
        env=dict(os.environ) | env,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    pid, address = (await process.stdout.readline()).decode().split()
    return process, int(pid), address


async def test_a_killed_daemon_leaves_no_engine_and_no_port(
    embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    daemon, pid, address = await start_daemon(model("small"), tmp_path, "ready")
    assert is_open(address)
    daemon.kill()
    await has_ended(pid)
    await daemon.wait()
    assert not is_open(address)


async def test_also_while_the_engine_is_still_loading(embedded: EmbeddedSource, model: Model, tmp_path: Path) -> None:
    daemon, pid, _ = await start_daemon(model("small"), tmp_path, "started")
    daemon.kill()
    await has_ended(pid)
    await daemon.wait()


async def test_a_killed_engine_is_told_with_its_last_lines(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "victim")
    await client_of(engine).post("/v1/completions", {"prompt": "the mesh", "max_tokens": 2})
    await logged(engine, "stop processing")
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        exit_ = await engine.wait()
    assert exit_.code == -signal.SIGKILL
    assert not exit_.never_ready
    assert not exit_.asked
    assert "SIGKILL" in exit_.reason
    assert "task 0" in exit_.reason
    assert exit_.end is EngineEnd.EXPLAINED


async def test_an_engine_that_ends_by_itself_of_a_request_is_told_from_one_that_was_killed(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "victim")
    deadly = {"prompt": "x", "grammar": "root ::= " + "(" * 50_000 + '"a"' + ")" * 50_000}
    with pytest.raises(ConnectionError):
        await client_of(engine).post("/v1/completions", deadly)
    async with asyncio.timeout(20):
        exit_ = await engine.wait()
    assert exit_.end is EngineEnd.CRASHED


async def test_a_build_for_another_processor_is_told_with_what_to_do(supervisor: Supervisor) -> None:
    command = Command(argv=(sys.executable, "-c", "import os, signal; os.kill(os.getpid(), signal.SIGILL)"))
    engine = await supervisor.launch(command, "foreign")
    async with asyncio.timeout(20):
        exit_ = await engine.wait()
    assert exit_.never_ready
    assert exit_.reason.startswith("ended by SIGILL (llama.cpp built for another processor?")


async def test_stopping_is_quick_and_frees_the_port(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "s")
    assert engine.info is not None
    exit_ = await engine.stop()
    # Not by SIGKILL, which comes a second later.
    assert exit_ == Exit(code=-signal.SIGTERM, reason="stopped", never_ready=False, asked=True)
    assert not is_open(engine.info.address)
    assert await engine.stop() == exit_


async def test_closing_ends_all_side_by_side_ready_or_not(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, stopping, most = RunningEngine.stop, 0, 0

    async def counted(engine: RunningEngine, grace: float) -> Exit:
        nonlocal stopping, most
        stopping += 1
        most = max(most, stopping)
        try:
            return await stop(engine, grace)
        finally:
            stopping -= 1

    ready = await started(supervisor, embedded, small_spec(model("small")), "a")
    loading = [
        await supervisor.launch(await supervisor.server_command(embedded, small_spec(model("small"))), f"b{n}")
        for n in range(2)
    ]
    monkeypatch.setattr(RunningEngine, "stop", counted)
    await supervisor.close()
    assert most == 3
    for engine in (ready, *loading):
        exit_ = await engine.wait()
        assert (exit_.code, exit_.asked) == (-signal.SIGTERM, True)
        await has_ended(engine.pid)


async def deaf_child(log: Path) -> Child:
    """A child that ignores SIGTERM already."""
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    deaf = asyncio.Event()
    child = await Child.spawn(Command(argv=(sys.executable, "-c", stubborn)), log, lambda _: deaf.set())
    await deaf.wait()
    return child


async def test_a_child_that_ignores_sigterm_is_made_to_end(tmp_path: Path) -> None:
    child = await deaf_child(tmp_path / "a.log")
    before = time.monotonic()
    assert await child.stop(grace=0.2) == -signal.SIGKILL
    assert time.monotonic() - before >= 0.2
    assert child.last_lines() == "deaf"


async def test_a_stop_that_nobody_waits_for_is_no_reprieve(tmp_path: Path) -> None:
    child = await deaf_child(tmp_path / "a.log")
    async with TaskScope("test") as scope:
        stopping = scope.spawn(child.stop(grace=600.0), "stop")
        await asyncio.sleep(0)
        stopping.cancel()
    assert await child.wait() == -signal.SIGKILL


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
async def test_a_full_disk_loses_the_log_and_not_the_child(tmp_path: Path) -> None:
    (tmp_path / "full.log").symlink_to("/dev/full")
    lines: list[bytes] = []
    talker = "for n in range(20000): print('line', n)"
    child = await Child.spawn(Command(argv=(sys.executable, "-c", talker)), tmp_path / "full.log", lines.append)
    assert await child.wait() == 0
    assert len(lines) == 20000
    assert child.last_lines().endswith("line 19999")


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    engine = await supervisor.launch(Command(argv=("/no/such/program",)), "x")
    exit_ = await engine.ready()
    assert isinstance(exit_, Exit)
    assert exit_.code == 127
    assert exit_.reason == "cannot run /no/such/program: No such file or directory"
    await supervisor.close()


def guard(*options: str, parent: int | None = None) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", str(GUARD), "--parent", str(parent or os.getpid()), *options, "--")


async def test_elsewhere_the_guard_watches_its_parent_by_a_pipe() -> None:
    program = (sys.executable, "-c", "import os, signal; print(os.getpid(), flush=True); signal.pause()")
    process = await asyncio.create_subprocess_exec(
        *guard("--watch-stdin"), *program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    assert pid != process.pid
    # The pipe's end is what a parent's death looks like.
    process.stdin.close()
    await has_ended(pid)
    assert await process.wait() == 137


@pytest.mark.parametrize(
    ("program", "code"),
    [
        ("import sys; sys.exit(5)", 5),
        ("import os, signal; os.kill(os.getpid(), signal.SIGABRT)", -signal.SIGABRT),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
@pytest.mark.parametrize("options", [(), ("--watch-stdin",)])
async def test_the_guard_ends_as_its_program_does(program: str, code: int, options: tuple[str, ...]) -> None:
    process = await asyncio.create_subprocess_exec(
        *guard(*options), sys.executable, "-c", program, stdin=asyncio.subprocess.PIPE
    )
    assert await process.wait() == code


async def test_a_guard_whose_parent_died_before_it_began_runs_nothing(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    process = await asyncio.create_subprocess_exec(*guard(parent=1), "touch", str(touched))
    assert await process.wait() == 137
    assert not touched.exists()
