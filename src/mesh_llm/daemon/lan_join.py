"""`--lan` before a node has a mesh: finds one on this network, and asks to be let in."""

from collections.abc import Sequence

import msgspec

from mesh_llm import __version__
from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.daemon.progress import OnProgress, Stage, Told
from mesh_llm.daemon.settings import Settings
from mesh_llm.discovery.lan_browse import LanNode, browse
from mesh_llm.net.asking import Asked, Asking
from mesh_llm.net.endpoint import EndpointSettings
from mesh_llm.net.identity import SigningKey
from mesh_llm.net.standing import has_company
from mesh_llm.net.store import MeshStores
from mesh_llm.runtime.home import Home
from mesh_llm.wire.admit import MAX_ASKER_NAME, Ask
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.fingerprint import fingerprint
from mesh_llm.wire.invite import print_invite

LOOK_SECONDS = 4.0


async def join_by_lan(settings: Settings, key: SigningKey, home: Home | None, on_progress: OnProgress) -> Settings:
    """The settings with an invite, where `--lan` found a mesh and somebody there let this machine in.

    Unchanged where there is a token, where this node has a mesh with others in it, and where nobody was found: then it
    begins a mesh of its own, for others to find. `home` None: nothing is kept there.

    Raises:
        MeshError: several meshes were found and none was named; the request was denied or not answered; a client found
            nothing.
    """
    if not settings.lan or settings.join or has_company(MeshStores(home.mesh if home is not None else None)):
        return settings
    on_progress(Stage(name="lan", text="looking for a mesh on this network", done=False))
    found = [node for node in await _look(settings) if node.listing.node != key.node_id]
    if not found:
        if settings.client:
            raise MeshError(
                code="lan_nothing_found",
                message="No mesh was found on this network.",
                hint="Start a node of it with --lan; or join with an invite: mesh-llm --client --join TOKEN",
                status=503,
            )
        on_progress(Stage(name="lan", text="no mesh on this network yet; this node begins one", done=True))
        return settings
    nodes = choose(found, settings.mesh_name)
    scope = Scope.CLIENT if settings.client else Scope.SERVE
    asking = Asking(
        key,
        nodes[0].listing.mesh,
        Ask(settings.node_name[:MAX_ASKER_NAME], scope),
        version=__version__,
        endpoint=EndpointSettings(relay=False),
    )
    names = {node.listing.node: node.listing.name for node in nodes}

    def waiting(node: NodeId) -> None:
        where = names.get(node) or node[:10]
        text = (
            f"{where} (key {fingerprint(node)}) was asked; let this machine in there:"
            f" mesh-llm approve {fingerprint(key.node_id)}"
        )
        on_progress(Told(level=NoticeLevel.INFO, code="lan_asked", text=text))

    on_progress(Stage(name="lan", text="asking to join", done=False))
    invite = await asking.run([Asked(node.listing.node, node.addresses) for node in nodes], waiting)
    on_progress(Stage(name="lan", text=f"let in as {invite.terms.scope.word}", done=True))
    return msgspec.structs.replace(settings, join=(print_invite(invite),))


async def _look(settings: Settings) -> list[LanNode]:
    try:
        return await browse(LOOK_SECONDS)
    except MeshError:
        # A node that serves is of use without a network; the announcer will say that there is none.
        if settings.client:
            raise
        return []


def choose(found: Sequence[LanNode], wanted: str) -> list[LanNode]:
    """The nodes of the one mesh to ask: by name, or by the beginning of its id; without either the only one there is.

    Raises MeshError(lan_not_found, lan_several).
    """
    meshes: dict[MeshId, list[LanNode]] = {}
    for node in found:
        if not wanted or _is(node, wanted):
            meshes.setdefault(node.listing.mesh, []).append(node)
    listed = "; ".join(sorted({_label(node) for node in found}))[:1000]
    if not meshes:
        raise MeshError(
            code="lan_not_found",
            message=f"No mesh called {wanted} was found on this network.",
            hint=f"Found: {listed}.",
            status=404,
        )
    if len(meshes) > 1:
        raise MeshError(
            code="lan_several",
            message=f"{len(meshes)} meshes were found on this network: {listed}.",
            hint="Say which one with --mesh-name NAME, or with the beginning of its id; see mesh-llm discover --lan",
            status=409,
        )
    return next(iter(meshes.values()))


def _is(node: LanNode, wanted: str) -> bool:
    text = wanted.casefold()
    return node.listing.mesh_name.casefold() == text or (len(text) >= 6 and node.listing.mesh.startswith(text))


def _label(node: LanNode) -> str:
    return f"{node.listing.mesh_name or 'unnamed'} ({node.listing.mesh[:10]}, on {node.listing.name or 'a node'})"
