"""What a node says of the one split group that it takes part in; a piece of its announcement."""

import msgspec

from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.split_layout import SplitLayout, SplitShare

MAX_ROUND_TRIP_MS = 80.0
"""Longest round trip between two nodes of a group, unless the user says otherwise."""

MOST_ROUND_TRIPS = 32
"""Other members to which a node tells its distance."""


class SplitWish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a user fixed by hand for a split model; whoever becomes host honours it.

    Attributes:
        context: tokens per slot; 0: choose.
        slots: parallel requests; 0: choose.
        shares: relative parts of the host and the workers after it (`--tensor-split`); empty: by memory.
    """

    context: int = 0
    slots: int = 0
    shares: tuple[float, ...] = ()


class SplitWord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node takes part in the group of `model`: it lends memory to whoever is elected.

    Attributes:
        model: served name.
        fingerprint: of the file; only the same file can be shared.
        bare: the file is not here: the node can lend, and never lead; a host that gives files sends it what it needs.
        memory_bytes: what the node offers to this model.
        seeds: a user here wants the model, so the group exists.
        asked: a user here wants it split even where it fits one node (`--split`).
        max_rtt_ms: longest round trip that this node accepts.
        round_trips: milliseconds to other members; one that cannot be used is left out.
        term: highest number of this group's forms that the node knows of.
        leads: this node is the host of the form `term`.
        shares: that form, of the host only; this node first.
        wish: what the user here fixed by hand.
    """

    model: ModelName
    fingerprint: str = ""
    memory_bytes: int = 0
    seeds: bool = False
    asked: bool = False
    max_rtt_ms: float = MAX_ROUND_TRIP_MS
    round_trips: dict[NodeId, float] = {}
    term: int = 0
    leads: bool = False
    shares: tuple[SplitShare, ...] = ()
    wish: SplitWish = SplitWish()
    bare: bool = False

    def layout(self, rpc_version: str = "") -> SplitLayout | None:
        """The form that this node leads; None where it leads none."""
        if not self.leads or not self.shares:
            return None
        return SplitLayout(term=self.term, shares=self.shares, rpc_version=rpc_version)
