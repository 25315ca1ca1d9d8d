"""How fast this machine reads weights: measured by the wheel's ggml in a process of its own, and kept on disk.

What the node learns later from real requests is kept with it, for the next start.
"""

import asyncio
import hashlib
import time
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.performance.calibration import Calibration
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.model import Capacity, Speed
from mesh_llm.engine.confinement.policy import client_environment
from mesh_llm.engine.probe import started_rpc_server
from mesh_llm.engine.process import python_module, run
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources.embedded.backends import load_arguments
from mesh_llm.engine.sources.embedded.plugin import find as find_plugin
from mesh_llm.engine.sources.embedded.source import NAME as EMBEDDED
from mesh_llm.engine.spec import CPU_DEVICE, RpcWorkerSpec
from mesh_llm.runtime.home import write_atomic
from mesh_llm.runtime.process import usable_cpus
from mesh_llm.runtime.supervision import WriteHealth

FILE = "speed.json"
"""Name of the file in a home's cache."""

_SECONDS = 60.0
_VERSION = 5

_log = structlog.get_logger(__name__)


class _Stored(msgspec.Struct, frozen=True):
    version: int
    machine: str
    experience: Calibration


async def speed_with(source: EngineSource, devices: tuple[str, ...], cache: Path) -> Speed | None:
    """The speed of this engine on these devices (as of `Measured.devices`); None if it cannot be measured.

    The wheel measures its own devices and, for any engine, the processor. A GPU that only the user's own llama.cpp can
    use is measured through its RPC server, with the plugin in `cache` as the client. Takes a second or two.
    """
    if devices == (CPU_DEVICE,):
        return await measure_speed(devices)
    if source.name == EMBEDDED:
        return await measure_speed(devices, await asyncio.to_thread(load_arguments, cache))
    plugin = await asyncio.to_thread(find_plugin, cache)
    if plugin is None:
        _log.info("speed not measured", reason="no RPC plugin")
        return None
    try:
        async with started_rpc_server(source.rpc_worker, RpcWorkerSpec(devices=devices, threads=1)) as server:
            if server.version != plugin.rpc_version:
                _log.info("speed not measured", rpc=server.version or server.problem, plugin=plugin.rpc_version)
                return None
            (endpoint,), env = await asyncio.to_thread(client_environment, (server.address,), cache)
            return await _measure("--rpc", endpoint, str(plugin.path), more_env=env)
    except MeshError as error:
        _log.info("speed not measured", reason=error.message)
        return None


async def measure_speed(devices: tuple[str, ...], load: tuple[str, ...] = ()) -> Speed | None:
    """Measure, in a second or two on all cores; None if the wheel has no such device, or is not installed.

    `load`: arguments for an accelerator's plugin, as of `load_arguments`.
    """
    return await _measure(*([",".join(devices)] if devices else []), *load)


async def _measure(*arguments: str, more_env: dict[str, str] | None = None) -> Speed | None:
    argv, env = python_module("mesh_llm.engine.sources.embedded.probe_main", "speed", *arguments)
    done = await run(argv, env | (more_env or {}), _SECONDS)
    try:
        speed = msgspec.json.decode(done.stdout, type=Speed)
    except UNREADABLE:
        _log.info("speed not measured", status=done.code, reason=done.last_lines())
        return None
    return speed if speed.known else None


async def known_experience(
    cache: Path, source: EngineSource, capacity: Capacity, devices: tuple[str, ...]
) -> Calibration | None:
    """What was learned earlier with this engine on these devices; measured again if that was long ago."""
    path, key = cache / FILE, machine_key(capacity, devices)
    stored = read_experience(path, key)
    if stored is not None and not stored.stale(time.time()):
        return stored
    speed = await speed_with(source, devices, cache)
    if speed is None:
        return stored
    beside = await speed_with(source, (CPU_DEVICE,), cache) if capacity.host_bytes else None
    before, now = stored or Calibration(speed=speed, probed_at=0.0), time.time()
    learned = before.probed(speed, now, beside or Speed())
    await asyncio.to_thread(keep_experience, path, key, learned)
    return learned


def machine_key(capacity: Capacity, devices: tuple[str, ...]) -> str:
    """Identifies what a measurement is valid for: this engine, on these devices, with this number of cores."""
    text = "\0".join((capacity.engine, *devices, *capacity.devices, str(usable_cpus())))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def read_experience(path: Path, key: str) -> Calibration | None:
    """What was learned earlier, if it is still valid."""
    try:
        stored = msgspec.json.decode(path.read_bytes(), type=_Stored)
    except (OSError, *UNREADABLE):
        return None
    same = (stored.version, stored.machine) == (_VERSION, key)
    return stored.experience if same and stored.experience.speed.known and stored.experience.plausible else None


def keep_experience(path: Path, key: str, experience: Calibration, health: WriteHealth | None = None) -> None:
    """Write it to disk for the next start. A failure is reported through `health`."""
    health = health or WriteHealth("what was learned of this machine's speed", "It is learned again.")
    try:
        write_atomic(path, msgspec.json.encode(_Stored(_VERSION, key, experience)))
    except OSError as error:
        health.failed(error)
    else:
        health.wrote()
