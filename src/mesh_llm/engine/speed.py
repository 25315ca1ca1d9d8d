"""How fast this machine reads weights: measured by the wheel's ggml in a process of its own, and kept."""

import asyncio
import hashlib
import os
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.model import Capacity
from mesh_llm.core.speed import Speed
from mesh_llm.engine.capture import run
from mesh_llm.engine.command import python_module
from mesh_llm.runtime.files import write_atomic

FILE = "speed.json"
"""In a home's cache."""

_SECONDS = 60.0
_VERSION = 1

_log = structlog.get_logger(__name__)


class _Kept(msgspec.Struct, frozen=True):
    version: int
    machine: str
    speed: Speed


async def measure_speed(devices: tuple[str, ...]) -> Speed | None:
    """Measure, in a second or two of all cores; None where ggml has no such device, or is not there."""
    argv, env = python_module("mesh_llm.engine.embedded.speed_main", *([",".join(devices)] if devices else []))
    done = await run(argv, env, _SECONDS)
    try:
        return msgspec.json.decode(done.stdout, type=Speed)
    except msgspec.MsgspecError:
        _log.info("speed not measured", status=done.code, reason=done.last_lines())
        return None


async def known_speed(cache: Path, capacity: Capacity, devices: tuple[str, ...]) -> Speed | None:
    """What was measured earlier with this engine on these devices, or else now."""
    path, key = cache / FILE, machine_key(capacity, devices)
    speed = read_speed(path, key)
    if speed is None:
        speed = await measure_speed(devices)
        if speed is not None and speed.known:
            await asyncio.to_thread(keep_speed, path, key, speed)
    return speed if speed is not None and speed.known else None


def machine_key(capacity: Capacity, devices: tuple[str, ...]) -> str:
    """What a measurement holds for: this engine, on these devices, with so many cores."""
    text = "\0".join((capacity.engine, *devices, *capacity.devices, str(os.cpu_count() or 1)))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_speed(path: Path, key: str) -> Speed | None:
    """What was measured earlier and still holds."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None
    return kept.speed if (kept.version, kept.machine) == (_VERSION, key) and kept.speed.known else None


def keep_speed(path: Path, key: str, speed: Speed) -> None:
    """Write it down for the next start; where that cannot be, it is measured again."""
    try:
        write_atomic(path, msgspec.json.encode(_Kept(_VERSION, key, speed)))
    except OSError as error:
        _log.warning("speed not kept", reason=str(error))
