"""What this machine keeps of models whose files it has not got, for `mesh-llm models`."""

import msgspec

from mesh_llm.core.errors import MeshError
from mesh_llm.core.status import Status
from mesh_llm.models.kept_shelf import KeptPart, kept_directory, kept_parts
from mesh_llm.runtime.home import Home


class KeptLayers(msgspec.Struct, frozen=True, kw_only=True):
    """Weights of some layers of a model that other nodes host; no model that could be served."""

    name: str
    size_bytes: int
    paths: tuple[str, ...]


def find_kept(model: str = "") -> list[KeptPart]:
    """All parts, or those of one model, whatever the case of its name."""
    wanted = model.casefold()
    found = kept_parts(kept_directory(Home.default().cache))
    return [part for part in found if not wanted or part.model.casefold() == wanted]


def shown(part: KeptPart) -> KeptLayers:
    """For an answer in JSON."""
    return KeptLayers(name=part.model, size_bytes=part.size_bytes, paths=tuple(map(str, part.paths)))


def remove_kept(parts: list[KeptPart]) -> int:
    """Remove them, unless the running node computes with one at present; the bytes that were given back.

    Raises:
        MeshError: `model_served`, `disk_failed`.
    """
    for part in parts:
        if part.model == _computed():
            raise MeshError(
                code="model_served",
                message=f"The running node computes layers of {part.model} for another node.",
                hint="Stop the node first, or drop the model where it is wanted.",
                status=409,
            )
        try:
            part.remove()
        except OSError as error:
            raise MeshError(
                code="disk_failed",
                message=f"{error.filename or part.model} cannot be removed: {error.strerror or error}.",
                hint="Check the permissions of its directory.",
            ) from error
    return sum(part.size_bytes for part in parts)


def _computed() -> str:
    """The model of which the running node computes layers for another one; empty where there is none."""
    from mesh_llm.cli.client import DaemonClient

    try:
        status = DaemonClient(Home.default()).get("/api/status", Status)
    except MeshError:
        return ""
    split = status.split
    if split is None or all(worker.node_id != status.node_id for worker in split.workers):
        return ""
    return split.model
