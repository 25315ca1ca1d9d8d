"""What `mesh-llm engine list` and `mesh-llm doctor` say about engines, as plain data."""

import asyncio
from collections.abc import Callable, Sequence

import msgspec

from mesh_llm.engine.devices import Machine, look_around
from mesh_llm.engine.source import EngineInfo, EngineSource


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One device. Sizes in bytes, 0 where unknown."""

    id: str
    name: str
    kind: str
    memory_total: int
    memory_free: int


class EngineReport(msgspec.Struct, frozen=True, kw_only=True):
    """One source. `chosen`: the one that models are run with unless the user says otherwise.

    `confinement`: how its RPC server is confined, or `not confined`; empty without RPC.
    """

    source: str
    version: str
    build: str
    rpc_version: str
    confinement: str
    path: str
    usable: bool
    chosen: bool
    devices: tuple[DeviceReport, ...]
    problems: tuple[str, ...]


class EnginesReport(msgspec.Struct, frozen=True, kw_only=True):
    """All sources, and the GPUs that the system lists whether or not an engine can use them."""

    engines: tuple[EngineReport, ...]
    system_gpus: tuple[DeviceReport, ...]


async def engines_report(
    sources: Sequence[EngineSource], machine: Callable[[], Machine] = look_around
) -> EnginesReport:
    """Look at every source, side by side. `sources` in the order of preference, as of `find_sources`."""
    infos, here = await asyncio.gather(
        asyncio.gather(*(source.info() for source in sources)), asyncio.to_thread(machine)
    )
    chosen = _chosen(infos)
    return EnginesReport(
        engines=tuple(_report(info, chosen=info is chosen) for info in infos),
        system_gpus=tuple(
            DeviceReport(
                id=one.id, name=one.name, kind=one.kind, memory_total=one.memory_total, memory_free=one.memory_free
            )
            for one in here.accelerators
        ),
    )


def _chosen(infos: Sequence[EngineInfo]) -> EngineInfo | None:
    usable = [info for info in infos if info.usable]
    return next((info for info in usable if any(one.holds_models for one in info.devices)), next(iter(usable), None))


def _report(info: EngineInfo, *, chosen: bool) -> EngineReport:
    return EngineReport(
        source=info.source,
        version=info.version,
        build=info.build,
        rpc_version=info.rpc_version,
        confinement=info.confinement,
        path=info.path,
        usable=info.usable,
        chosen=chosen,
        devices=tuple(
            DeviceReport(
                id=one.id, name=one.name, kind=one.kind, memory_total=one.memory_total, memory_free=one.memory_free
            )
            for one in info.devices
        ),
        problems=info.problems,
    )
