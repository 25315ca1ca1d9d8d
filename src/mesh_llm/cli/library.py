"""What the verbs about models look at: the library on disk, and what memory there is here and in the mesh."""

import asyncio
from dataclasses import dataclass

from mesh_llm.console.schema import Status
from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.library.files import known_stores
from mesh_llm.models.library.library import FactsCache, Library, model_directories, scan
from mesh_llm.runtime.home import Home


def facts_cache() -> FactsCache:
    """What the daemon of this home remembers of files, too."""
    return FactsCache(Home.default().cache / "models.json")


def look_at_disk(cache: FactsCache | None = None) -> Library:
    """All models on this machine, in the directories and stores that a node would look in."""
    return scan(model_directories(), cache or facts_cache(), stores=known_stores())


@dataclass(frozen=True)
class Memory:
    """Bytes that models may take: `here`, and in the `mesh` that the running node belongs to, itself included.

    None: not known, for lack of an engine or of a running node.
    """

    here: int | None = None
    mesh: int | None = None


def look_at_memory() -> Memory:
    """Ask the running node, which knows best what it offers; else measure as a node does when it starts."""
    from mesh_llm.cli.client import DaemonClient

    try:
        status = DaemonClient(Home.default()).get("/api/status", Status)
    except MeshError:
        return Memory(here=_measured())
    others = sum(peer.memory_bytes for peer in status.peers)
    return Memory(here=status.memory_bytes, mesh=status.memory_bytes + others if others else None)


def _measured() -> int | None:
    from mesh_llm.engine.devices import measure
    from mesh_llm.engine.sources.choice import choose, find_sources

    try:
        _, info = asyncio.run(choose(find_sources(None, Home.default().cache)))
        return measure(info).capacity.memory_bytes
    except MeshError:
        return None
