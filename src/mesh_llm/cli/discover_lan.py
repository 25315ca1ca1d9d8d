"""Meshes of the local network, as `mesh-llm discover --lan` shows them."""

from collections.abc import Sequence

import msgspec

from mesh_llm.cli.table import table
from mesh_llm.discovery.lan_browse import LanNode
from mesh_llm.wire.fingerprint import fingerprint


class FoundNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node that announces its mesh. `key`: the fingerprint of its key."""

    node_id: str
    key: str
    name: str
    addresses: tuple[str, ...]
    version: str


class FoundMesh(msgspec.Struct, frozen=True, kw_only=True):
    """A mesh of this network. Nothing of it is proven before it is joined. `more_models`: beside those listed."""

    mesh_id: str
    name: str
    models: tuple[str, ...]
    more_models: int
    nodes: tuple[FoundNode, ...]


def meshes(found: Sequence[LanNode]) -> list[FoundMesh]:
    """What was found, by mesh; those with most nodes first."""
    by_mesh: dict[str, list[LanNode]] = {}
    for node in found:
        by_mesh.setdefault(node.listing.mesh, []).append(node)
    return sorted((_mesh(nodes) for nodes in by_mesh.values()), key=lambda mesh: (-len(mesh.nodes), mesh.mesh_id))


def as_table(found: Sequence[FoundMesh]) -> list[str]:
    """Lines for a terminal: a row for each node, and how to join. Texts of strangers are made harmless."""
    rows = [
        (
            mesh.name or mesh.mesh_id[:10],
            node.name or node.node_id[:10],
            ", ".join(mesh.models) + (f" and {mesh.more_models} more" if mesh.more_models else "") or "-",
            node.addresses[0],
            node.version,
            node.key,
        )
        for mesh in found
        for node in mesh.nodes
    ]
    which = "" if len(found) == 1 else " --mesh-name NAME"
    return [
        *table(("MESH", "NODE", "MODELS", "ADDRESS", "VERSION", "KEY"), rows, ""),
        f"Join: mesh-llm --lan{which}. Somebody at one of these nodes must let you in: mesh-llm approve",
    ]


def _mesh(nodes: Sequence[LanNode]) -> FoundMesh:
    best = max((node.listing for node in nodes), key=lambda listing: (len(listing.models), listing.node))
    return FoundMesh(
        mesh_id=best.mesh,
        name=next((node.listing.mesh_name for node in nodes if node.listing.mesh_name), ""),
        models=best.models,
        more_models=best.more_models,
        nodes=tuple(
            FoundNode(
                node_id=node.listing.node,
                key=fingerprint(node.listing.node),
                name=node.listing.name,
                addresses=node.addresses,
                version=node.listing.version,
            )
            for node in nodes
        ),
    )
