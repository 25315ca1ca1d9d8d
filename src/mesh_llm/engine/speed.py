"""How fast this machine reads weights: measured by the wheel's ggml in a process of its own, and kept.

With it is kept what the node learned since, so that a restarted node knows what the stopped one knew.
"""

import asyncio
import hashlib
import os
import time
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.experience import Experience
from mesh_llm.core.model import Capacity
from mesh_llm.core.speed import Speed
from mesh_llm.engine.capture import run
from mesh_llm.engine.command import python_module
from mesh_llm.runtime.files import write_atomic

FILE = "speed.json"
"""In a home's cache."""

_SECONDS = 60.0
_VERSION = 2

_log = structlog.get_logger(__name__)


class _Kept(msgspec.Struct, frozen=True):
    version: int
    machine: str
    experience: Experience


async def measure_speed(devices: tuple[str, ...]) -> Speed | None:
    """Measure, in a second or two of all cores; None where ggml has no such device, or is not there."""
    argv, env = python_module("mesh_llm.engine.embedded.speed_main", *([",".join(devices)] if devices else []))
    done = await run(argv, env, _SECONDS)
    try:
        speed = msgspec.json.decode(done.stdout, type=Speed)
    except msgspec.MsgspecError:
        _log.info("speed not measured", status=done.code, reason=done.last_lines())
        return None
    return speed if speed.known else None


async def known_experience(cache: Path, capacity: Capacity, devices: tuple[str, ...]) -> Experience | None:
    """What was learned earlier with this engine on these devices, probed again where that was long ago."""
    path, key = cache / FILE, machine_key(capacity, devices)
    kept = read_experience(path, key)
    if kept is not None and not kept.stale(time.time()):
        return kept
    speed = await measure_speed(devices)
    if speed is None:
        return kept
    now = time.time()
    learned = Experience(speed=speed, probed_at=now) if kept is None else kept.probed(speed, now)
    await asyncio.to_thread(keep_experience, path, key, learned)
    return learned


def machine_key(capacity: Capacity, devices: tuple[str, ...]) -> str:
    """What a measurement holds for: this engine, on these devices, with so many cores."""
    text = "\0".join((capacity.engine, *devices, *capacity.devices, str(os.cpu_count() or 1)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_experience(path: Path, key: str) -> Experience | None:
    """What was learned earlier and still holds."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None
    same = (kept.version, kept.machine) == (_VERSION, key)
    return kept.experience if same and kept.experience.speed.known and kept.experience.sound else None


def keep_experience(path: Path, key: str, experience: Experience) -> None:
    """Write it down for the next start; where that cannot be, it is learned again."""
    try:
        write_atomic(path, msgspec.json.encode(_Kept(_VERSION, key, experience)))
    except OSError as error:
        _log.warning("speed not kept", reason=str(error))
