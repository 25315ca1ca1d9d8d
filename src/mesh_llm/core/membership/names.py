"""What people call a node, and which node they mean: names that several nodes have are told apart by their keys.

One rule for every list, message and command. A name that no other node has stands alone. Otherwise the beginning of
the node's key follows, `desk (3f9a)`: four digits, or as many as are needed.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import TypeAlias, TypeVar

import msgspec

from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import NodeId

KEY_DIGITS = 4
"""Hex digits of a key that follow a name, and the fewest that name a node without its name."""
Key = TypeVar("Key", bound=str)
"""A node's or a mesh's id."""
_UNNAMED_DIGITS = 10
_SUFFIX = re.compile(r" ?\(([0-9a-f]{2,64})\)$")


class AmbiguousNode(msgspec.Struct, frozen=True):
    """Several nodes could be meant; `choices` are their names, told apart."""

    asked: str
    choices: tuple[str, ...]


class UnknownNode(msgspec.Struct, frozen=True):
    """No node is meant; `choices` are the names of all."""

    asked: str
    choices: tuple[str, ...]


Resolved: TypeAlias = NodeId | AmbiguousNode | UnknownNode


def tell_apart(names: Mapping[Key, str]) -> dict[Key, str]:
    """The name to show for each node or mesh. `names`: those that they gave themselves; they may be empty.

    Case and spaces at the ends do not tell names apart. A name that ends as if it had a part of another key gets the
    part of its own: nobody can choose another node's shown name.
    """
    alike: dict[str, list[Key]] = {}
    for node, name in names.items():
        alike.setdefault(_folded(name), []).append(node)
    shown: dict[Key, str] = {}
    for nodes in alike.values():
        digits = _digits(nodes) if len(nodes) > 1 else KEY_DIGITS
        for node in nodes:
            shown[node] = _shown(node, names[node].strip(), digits, alone=len(nodes) == 1)
    return shown


def own_label(node: NodeId, name: str, others: Iterable[tuple[NodeId, str]]) -> str:
    """The name to show for one node, given the others: as `tell_apart` does it for all."""
    folded = _folded(name)
    alike = [node, *(other for other, theirs in others if _folded(theirs) == folded)]
    digits = _digits(alike) if len(alike) > 1 else KEY_DIGITS
    return _shown(node, name.strip(), digits, alone=len(alike) == 1)


def names_of(members: Iterable[Member]) -> Iterator[tuple[NodeId, str]]:
    """The names that these members gave themselves."""
    return ((member.announcement.node, member.announcement.name) for member in members)


def resolve_node(asked: str, names: Mapping[NodeId, str]) -> Resolved:
    """The node that a person means, among these: NODE of a command.

    `asked` may be a name in any case, a shown name as in `desk (3f9a)`, or the first digits of a key, four at least.
    A name that several nodes have is ambiguous, and so is one that is also the beginning of another node's key.
    """
    wanted = _folded(asked)
    shown = tell_apart(names)
    exact = {node for node, label in shown.items() if _folded(label) == wanted}
    found = exact or {node for node, name in names.items() if name and _folded(name) == wanted}
    suffix = _SUFFIX.search(wanted)
    if not found and suffix is not None:
        # The name of a node as it was shown when fewer or more digits were needed.
        name, key = wanted[: suffix.start()].rstrip(), suffix[1]
        found = {node for node, theirs in names.items() if _folded(theirs) == name and node.startswith(key)}
    if len(wanted) >= KEY_DIGITS:
        found = found | {node for node in names if node.startswith(wanted)}
    if len(found) == 1:
        return next(iter(found))
    if found:
        return AmbiguousNode(asked, tuple(sorted(_with_key(node, shown[node]) for node in found)))
    return UnknownNode(asked, tuple(sorted(shown.values())))


def _folded(name: str) -> str:
    return name.strip().casefold()


def _digits(nodes: Iterable[str]) -> int:
    """The fewest digits that tell these keys apart, `KEY_DIGITS` at least."""
    keys = sorted(nodes)
    digits = KEY_DIGITS
    for one, other in pairwise(keys):
        while digits < len(one) and one[:digits] == other[:digits]:
            digits += 1
    return digits


def _shown(node: str, name: str, digits: int, *, alone: bool) -> str:
    if not name:
        return node[: max(digits, _UNNAMED_DIGITS)]
    suffix = _SUFFIX.search(name)
    if suffix is not None and node.startswith(suffix[1]) and len(suffix[1]) >= digits:
        # Another node told this name apart already, as in the routes that a client fetches.
        return name
    return name if alone and suffix is None else f"{name} ({node[:digits]})"


def _with_key(node: NodeId, shown: str) -> str:
    """One of several nodes that fit what the user typed. It always has a part of the key."""
    return shown if shown.endswith(")") or node.startswith(shown) else f"{shown} ({node[:KEY_DIGITS]})"
