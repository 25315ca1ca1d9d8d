"""What the machine's owner does, as far as `--yield` asks: other programs' load, the battery, the screen, the clock."""

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
from mesh_llm.daemon.notices import OnStage, Told
from mesh_llm.runtime.supervision import TaskScope

PERIOD = 1.0
"""Seconds between two looks; an event follows only where something changed."""

_STEP = 0.05
_XPROP_SECONDS = 2.0
_FULLSCREEN = "_NET_WM_STATE_FULLSCREEN"

_log = structlog.get_logger(__name__)


def local_time() -> datetime:
    """The time of day as the owner's clock shows it."""
    return datetime.now(UTC).astimezone()


class OwnerSensor:
    """Looks once in a while. `own` lists this node's processes, whose work is not the owner's."""

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
        self._said: OwnerSensed | None = None

    async def look(self) -> None:
        """Sense everything that is asked for, and post it where it is new."""
        policy = self._policy
        busy = await asyncio.to_thread(self._load.measure) if policy.load else 0.0
        now = self._now()
        sensed = OwnerSensed(
            busy=round(busy / _STEP) * _STEP,
            on_battery=policy.battery and on_battery(),
            fullscreen=policy.fullscreen and await self._fullscreen(),
            minute=now.hour * 60 + now.minute if policy.schedule else 0,
        )
        if sensed != self._said:
            self._said = sensed
            self._post(sensed)

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(PERIOD)
            await self.look()


async def watch_owner(
    policy: YieldPolicy, post: Callable[[AnyEvent], None], on_progress: OnStage, scope: TaskScope
) -> None:
    """Look once, and from then on in `scope`, where the user asked for it; say what cannot be seen here."""
    if not policy.watches:
        return
    for text in blind_spots(policy):
        on_progress(Told(level=NoticeLevel.WARNING, code="yield_blind", text=text))
    sensor = OwnerSensor(policy, post)
    await sensor.look()
    scope.supervise(sensor.run, "owner")


@dataclass(frozen=True)
class Sample:
    """Seconds of processor time since the machine started: all, idle, and each of our own processes'."""

    total: float
    idle: float
    own: Mapping[int, float]


class OthersLoad:
    """The share of the processors that other programs used since the last measurement; blocking, some milliseconds."""

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
    # On Linux a guest's time is counted as its host process's too.
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
    """Whether the machine runs on its battery; one without, or one that cannot tell, does not."""
    battery = _battery()
    return battery is not None and battery.power_plugged is False


def _battery() -> Any | None:
    # Not there on every system.
    sense: Callable[[], Any] | None = getattr(psutil, "sensors_battery", None)
    return sense() if sense is not None else None


def blind_spots(policy: YieldPolicy, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What `--yield` asks for and cannot be seen on this machine, a sentence each."""
    found: list[str] = []
    if policy.battery and _battery() is None:
        found.append("--yield battery: this machine has no battery, so it never yields for that.")
    if policy.fullscreen:
        if not sys.platform.startswith("linux") or not environment.get("DISPLAY"):
            where = "this desktop" if sys.platform.startswith("linux") else "this system"
            found.append(f"--yield fullscreen: {where} does not tell, so it is not looked for; X11 desktops do.")
        elif shutil.which("xprop") is None:
            found.append("--yield fullscreen: xprop is missing, so it is not looked for; install x11-utils.")
    return found


async def screen_is_full() -> bool:
    """Whether the active window of an X11 desktop fills the screen; False where that cannot be told."""
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
