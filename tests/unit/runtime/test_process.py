"""The CPUs that a process may use, and the frozen heap."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Generator
from pathlib import Path

import pytest

from mesh_llm.core.types.ids import ModelName
from mesh_llm.engine.devices import threads_for, with_threads
from mesh_llm.engine.sources.choice import thread_limit
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.runtime.process import cpu_limit, cpu_quotas, freeze_heap, usable_cpus


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight CPUs, of which this process may use all."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def affinity(_: int) -> set[int]:
        return set(range(8))

    monkeypatch.setattr(os, "sched_getaffinity", affinity, raising=False)


@pytest.fixture
def one_cpu() -> Generator[None]:
    """This process really may run on one CPU only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.usefixtures("eight")
def test_without_limits_all_count(tmp_path: Path) -> None:
    assert usable_cpus(tmp_path, tmp_path) == 8
    assert cpu_limit(tmp_path, tmp_path) is None


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(("text", "cpus"), [("100000 100000", 1), ("150000 100000", 2), ("50000 100000", 1)])
def test_the_quota_of_version_2(tmp_path: Path, text: str, cpus: int) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "0::/outer/inner\n")
    write(groups / "outer" / "cpu.max", f"{text}\n")
    write(groups / "outer" / "inner" / "cpu.max", "max 100000\n")
    assert usable_cpus(proc, groups) == cpus
    assert cpu_limit(proc, groups) == cpus


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("mount", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_version_1(tmp_path: Path, mount: str) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n")
    # Inside a container the path is the host's, and its own group is the root.
    write(groups / mount / "cpu.cfs_quota_us", "300000\n")
    write(groups / mount / "cpu.cfs_period_us", "100000\n")
    assert cpu_quotas(proc, groups) == [3.0]
    assert usable_cpus(proc, groups) == 3
    write(groups / mount / "cpu.cfs_quota_us", "-1\n")
    assert cpu_quotas(proc, groups) == []


@pytest.mark.parametrize("text", ["", "max", "0 100000", "5", "nonsense 3", "100000 0"])
def test_what_says_nothing_limits_nothing(tmp_path: Path, text: str) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "0::/\n")
    write(groups / "cpu.max", text)
    assert cpu_quotas(proc, groups) == []


@pytest.mark.usefixtures("one_cpu")
def test_an_engine_takes_no_more_threads_than_the_affinity_mask_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    model = tmp_path / "large.gguf"
    with model.open("wb") as file:
        file.truncate(4 << 30)
    spec = EngineSpec(model=model, alias=ModelName("large"), context=512, slots=1)
    assert usable_cpus() == 1
    assert with_threads(spec).threads == 1
    assert threads_for(tmp_path / "missing.gguf") == 1
    assert thread_limit(0.5) == 1


@pytest.mark.usefixtures("one_cpu")
def test_a_child_inherits_the_limit() -> None:
    code = "import os; os.cpu_count = lambda: 8; from mesh_llm.runtime.process import usable_cpus; print(usable_cpus())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


class Knot:
    """Something that only the collector can free."""

    def __init__(self) -> None:
        self.itself = self


def test_what_is_there_is_frozen_and_later_garbage_is_not() -> None:
    freeze_heap()
    try:
        assert gc.get_freeze_count() > 1000
        later = weakref.ref(Knot())
        gc.collect()
        assert later() is None
    finally:
        gc.unfreeze()


_TURNS = """
import ctypes, subprocess, sys
from mesh_llm.runtime.process import _Scheduling, _SYSTEM_CALLS, wake_promptly
import platform

def turn():
    found = _Scheduling()
    read = _SYSTEM_CALLS[platform.machine()][1]
    assert ctypes.CDLL(None).syscall(read, 0, ctypes.byref(found), ctypes.sizeof(found), 0) == 0
    return found.runtime

if len(sys.argv) > 1:
    print(turn())
else:
    taken = [wake_promptly(), wake_promptly()]
    print(*taken, turn(), subprocess.check_output([sys.executable, "-c", sys.orig_argv[2], "child"], text=True))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_a_thread_that_wakes_promptly_has_short_turns_and_its_children_have_not() -> None:
    said = subprocess.run([sys.executable, "-c", _TURNS], text=True, capture_output=True, check=True).stdout.split()
    if said[:2] == ["False", "False"]:
        pytest.skip("before Linux 6.12")
    first, again, own, child = said
    assert (first, again, own) == ("True", "True", "100000")
    assert int(child) > 100000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_turns_that_somebody_else_decided_stay() -> None:
    code = (
        "import os; from mesh_llm.runtime.process import wake_promptly\n"
        "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0)); print(wake_promptly(), os.sched_getscheduler(0))"
    )
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True).stdout.split()
    assert said == ["False", str(os.SCHED_BATCH)]
