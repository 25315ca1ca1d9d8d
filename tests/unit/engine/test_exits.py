"""Whether an engine's end may be the fault of the requests that were on it."""

import signal
from pathlib import Path

import pytest

from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.engine.cpu import oom_kills
from mesh_llm.engine.supervisor import Exit


def ended(code: int, **more: bool) -> EngineEnd:
    fields = {"never_ready": False, "asked": False, **more}
    return Exit(code=code, reason="", **fields).end


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGSYS])
def test_a_fault_of_its_own_is_a_crash(number: signal.Signals) -> None:
    assert ended(-number) is EngineEnd.CRASHED
    assert ended(-number, out_of_memory=True) is EngineEnd.CRASHED
    assert ended(-number, asked=True) is EngineEnd.EXPLAINED
    assert ended(-number, never_ready=True) is EngineEnd.EXPLAINED


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_who_is_killed_from_outside_is_not_to_blame(number: signal.Signals) -> None:
    assert ended(-number) is EngineEnd.EXPLAINED


def test_want_of_memory_is_told_apart() -> None:
    assert ended(-signal.SIGKILL, out_of_memory=True) is EngineEnd.OUT_OF_MEMORY
    assert ended(-signal.SIGTERM, out_of_memory=True) is EngineEnd.EXPLAINED
    assert ended(1) is EngineEnd.CRASHED
    assert ended(0) is EngineEnd.EXPLAINED


def test_kills_for_memory_are_counted(tmp_path: Path) -> None:
    assert oom_kills(tmp_path / "proc", tmp_path / "groups") == 0
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "vmstat").write_text("pgfault 5\noom_kill 3\n")
    assert oom_kills(tmp_path / "proc", tmp_path / "groups") == 3
