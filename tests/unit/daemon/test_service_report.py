"""What a node reports to its service manager in the course of its life."""

import asyncio
import contextlib
import socket
from pathlib import Path

from mesh_llm.console.status import Status, StatusModel
from mesh_llm.daemon.published_state import ChangeSignal, Progress, Stage
from mesh_llm.daemon.service_report import ServiceReport, described
from mesh_llm.service_manager.notify import Notifier


def state(*models: StatusModel, role: str = "serve") -> Status:
    return Status(
        version="1", node_id="n", mesh_id="m", mesh_name="", name="a", role=role, ready=True, health="ready",
        api_port=1, api_base="", token="", uptime_s=0.0, pid=1, home="", memory_bytes=0, memory_total_bytes=0,
        devices=(), engine="", models=models, peers=(),
    )  # fmt: skip


def model(name: str, status: str, *, here: bool = True) -> StatusModel:
    return StatusModel(name=name, status=status, here=here)


def test_the_status_line_says_what_the_node_does() -> None:
    assert described(state()) == "no model loaded"
    assert described(state(role="client")) == "a client of the mesh"
    shown = described(
        state(model("a", "warm"), model("b", "warm"), model("c", "loading"), model("d", "warm", here=False))
    )
    assert shown == "serves a, b; c is loading"


async def test_a_life_is_reported_in_order(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)

        async def said() -> list[str]:
            loop = asyncio.get_running_loop()
            return (await asyncio.wait_for(loop.sock_recv(manager, 4096), 10.0)).decode().split("\n")

        passed: list[Progress] = []
        report = ServiceReport(Notifier(str(tmp_path / "notify"), watchdog=0.3), passed.append)
        stage = Stage(name="engine", text="looking", done=False)
        report.on_progress(stage)
        assert passed == [stage]
        assert "STATUS=starting: engine: looking" in await said()
        running = asyncio.get_running_loop().create_task(report.run(ChangeSignal(), lambda: state(model("a", "warm"))))
        assert await said() == ["READY=1"]
        assert await said() == ["WATCHDOG=1", "STATUS=serves a"]
        assert await said() == ["WATCHDOG=1"], "the watchdog hears of it without a change"

        async def reload() -> None:
            while (last := await said())[0] != "RELOADING=1":
                assert last == ["WATCHDOG=1"]

        await report.while_reloading(reload)
        while (last := await said()) != ["READY=1"]:
            assert last == ["WATCHDOG=1"]
        report.on_progress(stage)
        report.stopping(30.0)
        while "STOPPING=1" not in (last := await said()):
            assert last == ["WATCHDOG=1"], "after the start its steps are no status"
        assert int(last[1].removeprefix("EXTEND_TIMEOUT_USEC=")) > 30_000_000
        assert await said() == ["WATCHDOG=1"], "also while answers end"
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_without_a_manager_the_task_ends() -> None:
    await ServiceReport(Notifier(), lambda _: None).run(ChangeSignal(), state)
