"""How fast this machine reads weights: measured by the wheel's ggml in a process of its own, and kept.

With it is kept what the node learned since, so that a restarted node knows what the stopped one knew.
"""

import asyncio
import hashlib
import time
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.performance.prediction import Experience
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import Capacity, Speed
from mesh_llm.engine.confinement import library as sockets
from mesh_llm.engine.process import python_module, run
from mesh_llm.engine.rpc_probe import answering
from mesh_llm.engine.sources.base import EngineSource
from mesh_llm.engine.sources.embedded.plugin import find as find_plugin
from mesh_llm.engine.sources.embedded.source import NAME as EMBEDDED
from mesh_llm.engine.spec import CPU_DEVICE, RpcWorkerSpec
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.process import usable_cpus
from mesh_llm.runtime.supervision import WriteHealth

FILE = "speed.json"
"""In a home's cache."""

_SECONDS = 60.0
_VERSION = 3

_log = structlog.get_logger(__name__)


class _Kept(msgspec.Struct, frozen=True):
    version: int
    machine: str
    experience: Experience


async def speed_with(source: EngineSource, devices: tuple[str, ...], cache: Path) -> Speed | None:
    """What models of this engine meet on these devices, as of `Measured.devices`; None where it cannot be measured.

    The wheel takes its own devices' time and, with any engine, the processor's. A GPU that only the user's own
    llama.cpp can use is asked through its RPC server, for a second or two, with the plugin in `cache` as the client.
    """
    if source.name == EMBEDDED or devices == (CPU_DEVICE,):
        return await measure_speed(devices)
    plugin = await asyncio.to_thread(find_plugin, cache)
    if plugin is None:
        _log.info("speed not measured", reason="no RPC plugin")
        return None
    try:
        library = await asyncio.to_thread(sockets.provide, cache)
        async with answering(source.rpc_worker, RpcWorkerSpec(devices=devices, threads=1)) as answered:
            if answered.version != plugin.rpc_version:
                _log.info("speed not measured", rpc=answered.version or answered.problem, plugin=plugin.rpc_version)
                return None
            (endpoint,), reaching = sockets.client_environment((answered.address,), library)
            return await _measure("--rpc", endpoint, str(plugin.path), reaching=reaching)
    except MeshError as error:
        _log.info("speed not measured", reason=error.message)
        return None


async def measure_speed(devices: tuple[str, ...]) -> Speed | None:
    """Measure, in a second or two of all cores; None where the wheel has no such device, or is not there."""
    return await _measure(*([",".join(devices)] if devices else []))


async def _measure(*arguments: str, reaching: dict[str, str] | None = None) -> Speed | None:
    argv, env = python_module("mesh_llm.engine.sources.embedded.speed_main", *arguments)
    done = await run(argv, env | (reaching or {}), _SECONDS)
    try:
        speed = msgspec.json.decode(done.stdout, type=Speed)
    except msgspec.MsgspecError:
        _log.info("speed not measured", status=done.code, reason=done.last_lines())
        return None
    return speed if speed.known else None


async def known_experience(
    cache: Path, source: EngineSource, capacity: Capacity, devices: tuple[str, ...]
) -> Experience | None:
    """What was learned earlier with this engine on these devices, probed again where that was long ago."""
    path, key = cache / FILE, machine_key(capacity, devices)
    kept = read_experience(path, key)
    if kept is not None and not kept.stale(time.time()):
        return kept
    speed = await speed_with(source, devices, cache)
    if speed is None:
        return kept
    now = time.time()
    learned = Experience(speed=speed, probed_at=now) if kept is None else kept.probed(speed, now)
    await asyncio.to_thread(keep_experience, path, key, learned)
    return learned


def machine_key(capacity: Capacity, devices: tuple[str, ...]) -> str:
    """What a measurement holds for: this engine, on these devices, with so many cores."""
    text = "\0".join((capacity.engine, *devices, *capacity.devices, str(usable_cpus())))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_experience(path: Path, key: str) -> Experience | None:
    """What was learned earlier and still holds."""
    try:
        kept = msgspec.json.decode(path.read_bytes(), type=_Kept)
    except (OSError, msgspec.MsgspecError):
        return None
    same = (kept.version, kept.machine) == (_VERSION, key)
    return kept.experience if same and kept.experience.speed.known and kept.experience.sound else None


def keep_experience(path: Path, key: str, experience: Experience, health: WriteHealth | None = None) -> None:
    """Write it down for the next start; where that cannot be, it is learned again. `health` says so once."""
    health = health or WriteHealth("what was learned of this machine's speed", "It is learned again.")
    try:
        write_atomic(path, msgspec.json.encode(_Kept(_VERSION, key, experience)))
    except OSError as error:
        health.failed(error)
    else:
        health.wrote()
