"""What a node sends to the service manager, byte for byte, over a real socket."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh_llm.service_manager.notify import Notifier


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(5.0)
        yield listener


def said(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def test_each_report_is_one_datagram(manager: socket.socket) -> None:
    notifier = Notifier(manager.getsockname(), watchdog=30.0)
    notifier.starting("starting: engine")
    assert said(manager) == ["EXTEND_TIMEOUT_USEC=900000000", "STATUS=starting: engine"]
    notifier.ready()
    assert said(manager) == ["READY=1"]
    notifier.alive("serves tiny")
    assert said(manager) == ["WATCHDOG=1", "STATUS=serves tiny"]
    notifier.alive("serves tiny")
    assert said(manager) == ["WATCHDOG=1"], "a status that did not change is not sent again"
    notifier.reloading()
    first, second = said(manager)
    assert first == "RELOADING=1"
    assert second.startswith("MONOTONIC_USEC=")
    notifier.stopping(45.0)
    assert said(manager)[:2] == ["STOPPING=1", "EXTEND_TIMEOUT_USEC=45000000"]


def test_a_status_cannot_forge_another_line(manager: socket.socket) -> None:
    Notifier(manager.getsockname()).alive("serves a\nREADY=1" + "x" * 1000)
    (line,) = said(manager)
    assert line.startswith("STATUS=serves a READY=1xxx")
    assert len(line) < 420


def test_an_abstract_socket_is_reached_too() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("")  # the kernel chooses an abstract name
        listener.settimeout(5.0)
        Notifier("@" + listener.getsockname()[1:].decode()).ready()
        assert said(listener) == ["READY=1"]


def test_engines_do_not_inherit_the_variables() -> None:
    environment = {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}
    notifier = Notifier.from_environment(environment)
    assert environment == {}
    assert notifier.listening
    assert notifier.watchdog == 30.0


@pytest.mark.parametrize(
    "environment",
    [
        {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"},
        {"NOTIFY_SOCKET": "/run/notify", "WATCHDOG_USEC": "often"},
        {"WATCHDOG_USEC": "30000000"},
    ],
)
def test_a_watchdog_that_is_not_meant_is_not_served(environment: dict[str, str]) -> None:
    assert Notifier.from_environment(environment).watchdog == 0.0


def test_without_a_manager_nothing_happens(tmp_path: Path) -> None:
    for address in ("", str(tmp_path / "nobody"), "vsock:2:1234"):
        notifier = Notifier.from_environment({"NOTIFY_SOCKET": address})
        notifier.ready()
        notifier.alive("serves tiny")


def test_a_manager_that_does_not_read_holds_nobody_up(manager: socket.socket) -> None:
    notifier = Notifier(manager.getsockname(), watchdog=1.0)
    for number in range(2000):
        notifier.alive(f"status {number}")
