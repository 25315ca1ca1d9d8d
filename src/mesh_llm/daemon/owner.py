"""The owner's use of this machine, for `--yield`: other programs' load, the battery, the screen, the time of day."""

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psutil
import structlog

from mesh_llm.core.config import YieldPolicy
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.events import AnyEvent, OwnerSensed
from mesh_llm.daemon.published_state import NoticeShown, ProgressListener
from mesh_llm.runtime.supervision import TaskScope

PERIOD = 1.0
"""Seconds between two samples. An event follows only a change."""

_STEP = 0.05
_XPROP_SECONDS = 2.0
_FULLSCREEN = "_NET_WM_STATE_FULLSCREEN"

_log = structlog.get_logger(__name__)


def local_time() -> datetime:
    """The local time."""
    return datetime.now(UTC).astimezone()


class OwnerSensor:
    """Samples what the policy needs, and posts changes."""

    def __init__(
        self,
        policy: YieldPolicy,
        post: Callable[[AnyEvent], None],
        *,
        fullscreen: Callable[[], Awaitable[bool]] | None = None,
        now: Callable[[], datetime] = local_time,
    ) -> None:
        self._policy = policy
        self._post = post
        self._fullscreen = fullscreen or screen_is_full
        self._now = now
        self._load = OthersLoad()
        self._posted: OwnerSensed | None = None

    async def sample(self) -> None:
        """Sample once, and post a change."""
        policy = self._policy
        busy = await asyncio.to_thread(self._load.measure) if policy.load else 0.0
        now = self._now()
        sensed = OwnerSensed(
            busy=round(busy / _STEP) * _STEP,
            on_battery=policy.battery and on_battery(),
            fullscreen=policy.fullscreen and await self._fullscreen(),
            minute=now.hour * 60 + now.minute if policy.schedule else 0,
        )
        if sensed != self._posted:
            self._posted = sensed
            self._post(sensed)

    async def run(self) -> None:
        """Sample once a second; until cancelled."""
        while True:
            await asyncio.sleep(PERIOD)
            await self.sample()


async def watch_owner(
    policy: YieldPolicy, post: Callable[[AnyEvent], None], on_progress: ProgressListener, scope: TaskScope
) -> None:
    """Sample once, then regularly in `scope`, if the user wants it. Report what this machine cannot sense."""
    if not policy.watches:
        return
    for text in unavailable_senses(policy):
        on_progress(NoticeShown(level=NoticeLevel.WARNING, code="yield_blind", text=text))
    sensor = OwnerSensor(policy, post)
    await sensor.sample()
    scope.supervise(sensor.run, "owner")


@dataclass(frozen=True)
class Sample:
    """Seconds of processor time since the machine started: total, idle, and of each process of this node."""

    total: float
    idle: float
    own: Mapping[int, float]


class OthersLoad:
    """The share of the processors that other programs used since the last measurement. Blocks for some milliseconds."""

    def __init__(self, sample: Callable[[], Sample] | None = None) -> None:
        self._sample = sample or _sample
        self._before = self._sample()

    def measure(self) -> float:
        """0.0 to 1.0."""
        before, now = self._before, self._sample()
        self._before = now
        total = now.total - before.total
        if total <= 0.0:
            return 0.0
        own = sum(spent - before.own.get(pid, 0.0) for pid, spent in now.own.items())
        return min(1.0, max(0.0, (total - (now.idle - before.idle) - own) / total))


def _sample() -> Sample:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts a guest's time also as its host process's.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    me = psutil.Process()
    own: dict[int, float] = {}
    for process in (me, *me.children(recursive=True)):
        try:
            spent = process.cpu_times()
        except psutil.Error:
            continue
        own[process.pid] = spent.user + spent.system
    return Sample(sum(times) - guests, idle, own)


def on_battery() -> bool:
    """Whether the machine runs on its battery; False if it has none or cannot report it."""
    battery = _battery()
    return battery is not None and battery.power_plugged is False


def _battery() -> Any | None:
    # Missing on some systems.
    sense: Callable[[], Any] | None = getattr(psutil, "sensors_battery", None)
    return sense() if sense is not None else None


def unavailable_senses(policy: YieldPolicy, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What `--yield` asks for and this machine cannot sense; a sentence each."""
    found: list[str] = []
    if policy.battery and _battery() is None:
        found.append("--yield battery: this machine has no battery, so this never applies.")
    if policy.fullscreen:
        if not sys.platform.startswith("linux") or not environment.get("DISPLAY"):
            where = "this desktop" if sys.platform.startswith("linux") else "this system"
            found.append(f"--yield fullscreen: {where} does not report it, so this never applies; X11 desktops do.")
        elif shutil.which("xprop") is None:
            found.append("--yield fullscreen: xprop is missing, so this never applies. Install x11-utils.")
    return found


async def screen_is_full() -> bool:
    """Whether the active window of an X11 desktop fills the screen; False if that is unknown."""
    if not os.environ.get("DISPLAY") or shutil.which("xprop") is None:
        return False
    active = await _xprop("-root", "_NET_ACTIVE_WINDOW")
    window = active.rpartition("# ")[2].partition(",")[0].strip()
    if not window.startswith("0x") or window == "0x0":
        return False
    return _FULLSCREEN in await _xprop("-id", window, "_NET_WM_STATE")


async def _xprop(*arguments: str) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            "xprop",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        _log.warning("xprop cannot be run", reason=str(error))
        return ""
    try:
        async with asyncio.timeout(_XPROP_SECONDS):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        return ""
    return output.decode("utf-8", "replace")
