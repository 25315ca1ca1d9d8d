"""What is sensed of the machine's owner: from the operating system's numbers to events."""

import os
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from mesh_llm.core.config import YieldPolicy
from mesh_llm.core.types.events import AnyEvent, OwnerSensed
from mesh_llm.daemon.owner import OthersLoad, OwnerSensor, Sample, on_battery, screen_is_full, unavailable_senses


def load(*samples: Sample) -> OthersLoad:
    return OthersLoad(iter(samples).__next__)


def test_others_load_is_what_is_neither_idle_nor_ours() -> None:
    measured = load(Sample(100.0, 50.0, {1: 10.0}), Sample(120.0, 56.0, {1: 12.0, 2: 3.0}))
    # Of 20 seconds 6 were idle and 5 our own.
    assert measured.measure() == pytest.approx(9 / 20)


def test_others_load_is_never_out_of_bounds() -> None:
    assert load(Sample(10.0, 5.0, {}), Sample(10.0, 5.0, {})).measure() == 0.0
    assert load(Sample(10.0, 5.0, {}), Sample(20.0, 5.0, {1: 99.0})).measure() == 0.0


def test_this_machine_can_be_measured() -> None:
    assert 0.0 <= OthersLoad().measure() <= 1.0


async def test_only_what_changed_is_posted_and_only_what_is_asked_for_is_looked_at() -> None:
    events: list[AnyEvent] = []
    times = [datetime(2026, 1, 1, 9, 30, second, tzinfo=UTC) for second in (0, 20)]
    times.append(datetime(2026, 1, 1, 9, 31, tzinfo=UTC))

    async def fullscreen() -> bool:
        raise AssertionError("nobody asked")

    policy = YieldPolicy(schedule=((0, 1),))
    sensor = OwnerSensor(policy, events.append, fullscreen=fullscreen, now=iter(times).__next__)
    for _ in times:
        await sensor.sample()
    assert events == [OwnerSensed(minute=570), OwnerSensed(minute=571)]


async def test_a_full_screen_is_posted() -> None:
    events: list[AnyEvent] = []
    answers = iter([False, True])

    async def fullscreen() -> bool:
        return next(answers)

    sensor = OwnerSensor(YieldPolicy(fullscreen=True), events.append, fullscreen=fullscreen)
    await sensor.sample()
    await sensor.sample()
    assert events == [OwnerSensed(), OwnerSensed(fullscreen=True)]


@pytest.mark.parametrize(("plugged", "expected"), [(False, True), (True, False), (None, False)])
def test_the_battery(monkeypatch: pytest.MonkeyPatch, plugged: bool | None, expected: bool) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: SimpleNamespace(power_plugged=plugged), raising=False)
    assert on_battery() is expected
    assert unavailable_senses(YieldPolicy(battery=True)) == []


def test_what_cannot_be_seen_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "sensors_battery", lambda: None, raising=False)
    assert not on_battery()
    found = unavailable_senses(YieldPolicy(battery=True, fullscreen=True), {})
    assert len(found) == 2
    monkeypatch.setenv("PATH", "")
    (found,) = unavailable_senses(YieldPolicy(fullscreen=True), {"DISPLAY": ":0"})
    assert "xprop" in found or "does not tell" in found


XPROP = """#!/bin/sh
if [ "$1" = -root ]; then echo "_NET_ACTIVE_WINDOW(WINDOW): window id # {window}"
else echo "_NET_WM_STATE(ATOM) = {state}"; fi
"""


@pytest.mark.parametrize(
    ("window", "state", "full"),
    [
        ("0x3a00007", "_NET_WM_STATE_FULLSCREEN, _NET_WM_STATE_FOCUSED", True),
        ("0x3a00007", "_NET_WM_STATE_MAXIMIZED_VERT", False),
        ("0x0", "_NET_WM_STATE_FULLSCREEN", False),
    ],
)
async def test_the_screen_of_an_x11_desktop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: str, state: str, full: bool
) -> None:
    program = tmp_path / "xprop"
    program.write_text(XPROP.replace("{window}", window).replace("{state}", state))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("DISPLAY", ":0")
    assert await screen_is_full() is full
    monkeypatch.delenv("DISPLAY")
    assert not await screen_is_full()
