"""Whose node this is: the owner's key and the statement of ownership in the home."""

import time
from pathlib import Path

import structlog

from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId, OwnerId
from mesh_llm.net.admission.credentials import SigningKey, key_text, load_key, verify
from mesh_llm.runtime.home import Home, write_atomic
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.owners import Owned, format_ownership, ownership_holds, parse_ownership, sign_ownership

LASTS_DAYS = 365
_DAY = 86400
_MOST = 4096
_log = structlog.get_logger(__name__)


def create_owner(home: Home) -> OwnerId:
    """Make the key of an owner in this home. Raises MeshError `owner_exists`."""
    path = home.owner_key
    known = load_key(path)
    if known is not None:
        raise MeshError(
            "owner_exists",
            f"There is an owner key already: {known.public.hex()}.",
            f"It is in {path}. To have another owner, move that file away first.",
            409,
        )
    made = SigningKey.generate()
    write_atomic(path, key_text(made))
    return OwnerId(made.public.hex())


def owner_key(home: Home) -> SigningKey:
    """The owner's key in this home. Raises MeshError `no_owner`."""
    known = load_key(home.owner_key)
    if known is None:
        raise MeshError(
            "no_owner", f"There is no owner key in {home.owner_key}.", "Make one: mesh-llm owner create", 404
        )
    return known


def sign_for(key: SigningKey, node: NodeId, days: int = LASTS_DAYS) -> str:
    """The owner's statement that a node is theirs, as text."""
    now = int(time.time())
    made = sign_ownership(OwnerId(key.public.hex()), node, now, now + days * _DAY, key.sign)
    return format_ownership(node, made)


def accept(home: Home, text: str) -> Owned:
    """Keep an owner's statement about the node of this home. Raises MeshError."""
    owned = parse_ownership(text)
    if isinstance(owned, Malformed):
        raise MeshError("bad_ownership", f"This is no statement of ownership: {owned.reason}.", "Copy it whole.")
    key = load_key(home.key)
    if key is None or owned.node != key.node_id:
        here = "none yet: start the node once" if key is None else key.node_id
        raise MeshError(
            "other_node",
            f"The statement is about node {owned.node}.",
            f"The key of this node is {here}. Ask for one with: mesh-llm owner add {here if key else 'KEY'}",
        )
    if not ownership_holds(owned.ownership, owned.node, time.time(), verify):
        raise MeshError(
            "bad_ownership", "The statement does not hold: it has ended, or was not signed by its owner.",
            f"The owner makes another: mesh-llm owner add {owned.node}",
        )  # fmt: skip
    write_atomic(home.ownership, text.strip().encode() + b"\n")
    return owned


def take_back(home: Home) -> bool:
    """Forget an owner's statement about the node of this home; returns whether there was one."""
    found = home.ownership.exists()
    home.ownership.unlink(missing_ok=True)
    return found


def kept_ownership(home: Home) -> Owned | None:
    """The statement in this home, if there is one that holds, whichever node it is about."""
    text = _read(home.ownership)
    owned = parse_ownership(text) if text else None
    if owned is None or isinstance(owned, Malformed):
        return None
    return owned if ownership_holds(owned.ownership, owned.node, time.time(), verify) else None


def ownership_of(home: Home, node: NodeId) -> Ownership | None:
    """The statement about this node, to be announced."""
    owned = kept_ownership(home)
    if owned is None:
        if home.ownership.exists():
            _log.warning("the owner's statement about this node does not hold any more", file=str(home.ownership))
        return None
    return owned.ownership if owned.node == node else None


def owner_here(home: Home) -> str:
    """The owner of this home: by the statement about its node, or by the owner's key; empty: none."""
    owned = kept_ownership(home)
    if owned is not None:
        return owned.ownership.owner
    known = load_key(home.owner_key)
    return known.public.hex() if known is not None else ""


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST).decode("ascii", "replace")
    except FileNotFoundError:
        return ""
