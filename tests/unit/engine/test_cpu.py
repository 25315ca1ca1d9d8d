from pathlib import Path

import psutil

from mesh_llm.engine.cpu import cgroup_limits, cpu_device, reserve

GIB = 2**30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_without_groups(tmp_path: Path) -> None:
    device = cpu_device(proc=tmp_path, cgroups=tmp_path)
    assert device.id == "CPU"
    assert device.name
    assert device.memory_total == psutil.virtual_memory().total


def test_version_2_counts_every_level_and_not_the_page_cache(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "0::/user/app\n")
    write(groups / "user" / "memory.max", f"{2 * GIB}\n")
    write(groups / "user" / "memory.current", f"{GIB}\n")
    write(groups / "user" / "memory.stat", f"anon 5\ninactive_file {GIB // 4}\n")
    write(groups / "user" / "app" / "memory.max", "max\n")
    write(groups / "user" / "app" / "memory.current", "1000\n")
    assert cgroup_limits(proc, groups) == [(2 * GIB, GIB - GIB // 4)]
    device = cpu_device(proc, groups)
    assert device.memory_total == min(2 * GIB, psutil.virtual_memory().total)
    assert device.memory_free <= GIB + GIB // 4


def test_version_1(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n")
    # Inside a container the path is the host's, and its own group is the root.
    write(groups / "memory" / "memory.limit_in_bytes", f"{GIB}\n")
    write(groups / "memory" / "memory.usage_in_bytes", f"{GIB // 2}\n")
    write(groups / "memory" / "memory.stat", f"total_inactive_file {GIB // 4}\n")
    assert cgroup_limits(proc, groups) == [(GIB, GIB // 4)]


def test_a_group_that_is_over_its_limit_offers_nothing(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    write(proc / "self" / "cgroup", "0::/\n")
    write(groups / "memory.max", "1000\n")
    write(groups / "memory.current", "5000\n")
    assert cpu_device(proc, groups).memory_free == 0


def test_reserve_is_a_tenth_within_bounds() -> None:
    assert reserve(2 * GIB) == GIB // 2
    assert reserve(20 * GIB) == 2 * GIB
    assert reserve(500 * GIB) == 8 * GIB
