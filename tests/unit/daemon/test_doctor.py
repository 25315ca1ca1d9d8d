import errno
import tempfile
from pathlib import Path

import pytest

from mesh_llm.console.status import StatusPeer
from mesh_llm.daemon.doctor import (
    Finding,
    Verdict,
    check_devices,
    check_engines,
    check_home,
    check_peers,
    check_service,
)
from mesh_llm.engine.devices import Machine
from mesh_llm.engine.spec import DeviceInfo, DeviceKind, EngineInfo, EnginePart, PartState
from mesh_llm.runtime.home import Home
from mesh_llm.service_manager.control import Problem, ServiceStatus

GIB = 2**30
CPU = DeviceInfo(id="CPU", name="Some CPU", kind=DeviceKind.CPU, memory_total=32 * GIB, memory_free=20 * GIB)
GPU = DeviceInfo(id="CUDA0", name="NVIDIA H200", kind=DeviceKind.GPU, memory_total=150 * GIB, memory_free=149 * GIB)
HERE = Machine(cpu=CPU, nvidia=(GPU,))


def looked(*engines: EngineInfo, machine: Machine = HERE) -> list[Finding]:
    return [one for one in check_devices(engines, lambda: machine) if one.topic == "devices"]


def test_a_gpu_that_no_engine_uses_is_told_with_what_to_do() -> None:
    shown, told = looked(EngineInfo(source="embedded", devices=(CPU,)))
    assert shown.verdict is Verdict.OK
    assert told.verdict is Verdict.WARNING
    assert "NVIDIA H200" in told.text
    assert "--bin-dir" in told.hint


def test_a_gpu_that_one_engine_uses_is_no_warning() -> None:
    embedded, own = EngineInfo(source="embedded", devices=(CPU,)), EngineInfo(source="binaries", devices=(GPU, CPU))
    assert {one.verdict for one in looked(embedded, own)} == {Verdict.OK}


def test_an_engine_that_does_not_start_uses_no_gpu() -> None:
    broken = EngineInfo(source="binaries", devices=(GPU, CPU), usable=False)
    assert looked(EngineInfo(source="embedded", devices=(CPU,)), broken)[-1].verdict is Verdict.WARNING


def test_no_gpu_is_no_warning() -> None:
    assert len(looked(EngineInfo(source="embedded", devices=(CPU,)), machine=Machine(cpu=CPU))) == 1


def test_a_plugin_that_was_set_aside_is_told_with_what_to_do() -> None:
    good = EnginePart(name="vulkan", state=PartState.READY, text="tested on Vulkan0")
    bad = EnginePart(name="cuda", state=PartState.FAILED, text="wrong results.", hint="Update the driver.")
    rpc = EnginePart(name="rpc", state=PartState.FAILED, text="not of interest here")
    _, ready, aside = check_engines([EngineInfo(source="embedded", parts=(rpc, good, bad))])
    assert (ready.verdict, ready.text) == (Verdict.OK, "the vulkan plugin: tested on Vulkan0")
    assert (aside.verdict, aside.text, aside.hint) == (
        Verdict.WARNING,
        "the cuda plugin: wrong results.",
        "Update the driver.",
    )


@pytest.mark.parametrize(("number", "hint"), [(errno.ENOSPC, "Make room"), (errno.EROFS, "Make that disk writable")])
def test_a_home_on_a_disk_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    def no_file(**_: object) -> None:
        raise OSError(number, "no")

    assert [one.verdict for one in check_home(Home(tmp_path))] == [Verdict.OK]
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", no_file)
    (found,) = check_home(Home(tmp_path))
    assert found.verdict is Verdict.PROBLEM
    assert found.hint.startswith(hint)


def test_a_service_and_its_problems_are_shown() -> None:
    well = ServiceStatus(scope="user", file="u", installed=True, active=True, state="active", text="serves tiny")
    ill = ServiceStatus(
        scope="system", file="u", installed=True, problems=(Problem(text="It is gone.", hint="Install it."),)
    )
    absent = ServiceStatus(scope="system", file="u", installed=False)
    first, second = check_service([well, ill, absent])
    assert (first.verdict, first.text) == (Verdict.OK, "a service of this user: active, serves tiny")
    assert (second.verdict, second.text, second.hint) == (Verdict.WARNING, "It is gone.", "Install it.")


def test_what_carries_requests_to_each_peer_is_said_and_why_it_is_not_tcp() -> None:
    def peer(name: str, transport: str, reason: str = "") -> StatusPeer:
        return StatusPeer(
            node_id="ab" * 32, name=name, role="serve", state="alive", transport=transport, transport_reason=reason
        )

    found = check_peers(
        [
            peer("fast", "tcp"),
            peer("new", "quic"),
            peer("walled", "quic", "TCP gave no answer within 3 s"),
            peer("far", "relay", "the nodes do not reach each other directly"),
            peer("gone", ""),
        ]
    )
    assert [one.text for one in found] == [
        "fast is reached over TCP",
        "new is reached over QUIC: TCP is tried with the first request",
        "walled is reached over QUIC: TCP gave no answer within 3 s",
        "far is reached through a relay: the nodes do not reach each other directly",
    ]
    assert ["--quic-port" in one.hint for one in found] == [False, False, True, False]
    assert {one.verdict for one in found} == {Verdict.OK}
