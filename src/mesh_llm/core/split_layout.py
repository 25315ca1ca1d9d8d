"""How one model lies on several machines: who computes how many of its layers, and what that takes of their memory."""

import msgspec

from mesh_llm.core.ids import ModelName, NodeId

MOST_SHARES = 16
"""Nodes of one group that compute at once: each costs every token a hop."""


class SplitShare(msgspec.Struct, frozen=True, kw_only=True):
    """One node's part of a split model.

    Attributes:
        node: who.
        layers: how many of the model's repeating layers, in the order of the shares.
        memory_bytes: weights, cache and buffers there, as planned.
    """

    node: NodeId
    layers: int
    memory_bytes: int = 0


class SplitLayout(msgspec.Struct, frozen=True, kw_only=True):
    """A whole split model.

    Attributes:
        term: number of the group's present form; rises with every change of host or shares.
        shares: the host first, then the workers in the order in which a token visits them.
        rpc_version: ggml RPC protocol that all of them speak.
    """

    term: int
    shares: tuple[SplitShare, ...]
    rpc_version: str = ""

    @property
    def host(self) -> SplitShare:
        """The node that drives the others and answers requests."""
        return self.shares[0]

    @property
    def workers(self) -> tuple[SplitShare, ...]:
        """The other nodes."""
        return self.shares[1:]

    def share(self, node: NodeId) -> SplitShare | None:
        """A node's part, if it has one."""
        return next((share for share in self.shares if share.node == node), None)


class Lending(msgspec.Struct, frozen=True, kw_only=True):
    """This node computes a part of a model for its group's host.

    Attributes:
        model: which.
        host: the elected one; nobody else may use this node.
        layout: the group's form; its workers may hand each other what they computed.
        memory_bytes: what this node keeps free for it.
    """

    model: ModelName
    host: NodeId
    layout: SplitLayout
    memory_bytes: int
