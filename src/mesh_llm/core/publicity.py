"""A node's wish that its mesh be listed for others to find, and which of several such nodes writes the listing."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from mesh_llm.core.announcement import Announcement

MAX_MESH_NAME = 64
MAX_REGION = 32
MAX_CLIENTS = 1_000_000
ListingScope: TypeAlias = Literal["client", "serve", "split"]
SCOPES: tuple[ListingScope, ...] = ("client", "serve", "split")


class Publicity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The wish, as it is announced.

    Attributes:
        name: what people call the mesh; may be empty.
        region: where it is, as in `AU`; may be empty.
        max_clients: passive nodes at which the mesh is full and no longer listed; 0: no limit.
        scope: of the invite in the listing: client, serve or split.
        failing: no relay takes this node's listing at present: another member should write it, if there is one.
    """

    name: str = ""
    region: str = ""
    max_clients: int = 0
    scope: ListingScope = "serve"
    failing: bool = False


def elected(words: Iterable["Announcement"]) -> "Announcement | None":
    """Of these members' words, that of the one who writes the mesh's listing; the same on every node.

    The one that has lived longest: a newcomer never takes the place of one that does it well.
    """
    willing = [(word.publicity.failing, word.incarnation, word.node, word) for word in words if word.publicity]
    return min(willing, key=lambda entry: entry[:3])[3] if willing else None


def mesh_name(words: Iterable["Announcement"]) -> str:
    """What the mesh is called: as its publisher says, or else as the one that has lived longest of those that say."""
    known = list(words)
    publisher = elected(known)
    if publisher is not None and publisher.publicity is not None and publisher.publicity.name:
        return publisher.publicity.name
    named = [(word.incarnation, word.node, word.publicity.name) for word in known if word.publicity]
    return next((name for _, _, name in sorted(named) if name), "")


def same_name(one: str, other: str) -> bool:
    """Whether two meshes are called the same; one without a name is called like no other."""
    return bool(one.strip()) and one.strip().casefold() == other.strip().casefold()
