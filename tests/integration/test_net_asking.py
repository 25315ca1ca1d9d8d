"""Asking to be let in without an invite, over real QUIC: a yes, a no, silence, and those that may not ask."""

import asyncio
import os

import pytest
from tests.integration.net_nodes import MeshNode, running, within
from tests.integration.net_raw import stranger

from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import PeerConnected
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.approvals import ApprovalClient
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.quic.endpoint import EndpointSettings
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import encode, fingerprint
from mesh_llm.wire.mesh.admission import AdmitRequest, ApprovalRequest, Approved, Reason, Refused, Scope, Subject
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.invites import Invite, format_invite

REQUEST = AdmitRequest(2, 2, "test", os.urandom(8), ask=ApprovalRequest("shelf", Scope.SERVE))


class Asker:
    """A machine that asks; `waiting` is set once its request was taken."""

    def __init__(self) -> None:
        self.key = SigningKey.generate()
        self.id = fingerprint(self.key.node_id)
        self.waiting = asyncio.Event()

    async def ask(self, node: MeshNode, mesh: str = "", scope: Scope = Scope.SERVE) -> Invite:
        asking = ApprovalClient(
            self.key,
            node.net.mesh_id if not mesh else type(node.net.mesh_id)(mesh),
            ApprovalRequest("shelf", scope),
            version="test",
            endpoint=EndpointSettings(relay=False, host="127.0.0.1"),
        )
        return await asking.run(
            [KnownPeer(node=node.net.node_id, addresses=node.net.reachable().addresses)], self._taken
        )

    def _taken(self, _: NodeId) -> None:
        self.waiting.set()


async def test_who_is_approved_joins_with_what_it_was_given() -> None:
    node, asker = MeshNode(approvals=True), Asker()
    async with running(node), TaskScope("askers") as scope:
        asked = scope.spawn(asker.ask(node), "asker")
        await within(20, asker.waiting.wait())
        assert node.net.approvals is not None
        (waiting,) = node.net.approvals.waiting()
        assert (waiting.id, waiting.name, waiting.address) == (asker.id, "shelf", "127.0.0.1")
        node.net.approvals.approve(asker.id)
        invite = await within(20, asked)
        joiner = MeshNode(format_invite(invite), key=asker.key)
        async with running(joiner):
            assert (await joiner.net.joiner.join()).admitted == node.net.node_id
            assert joiner.net.scope is Scope.SERVE
            await node.seen(PeerConnected, lambda event: event.node == asker.key.node_id)
        # The invite is of no use to anybody else who gets hold of it, and is listed for revoking.
        thief = MeshNode(format_invite(invite))
        async with running(thief):
            report = await thief.net.joiner.join()
            assert report.admitted is None
            assert report.problems[0].code == "invite_uses_exhausted"
        assert node.net.invites()[0].uses_left == 0


async def test_who_is_denied_is_told_so() -> None:
    node, asker = MeshNode(approvals=True), Asker()
    async with running(node), TaskScope("askers") as scope:
        asked = scope.spawn(asker.ask(node), "asker")
        await within(20, asker.waiting.wait())
        assert node.net.approvals is not None
        node.net.approvals.deny(asker.id)
        with pytest.raises(MeshError, match="The request to join was denied"):
            await within(20, asked)


async def test_a_request_that_nobody_answers_expires() -> None:
    node, asker = MeshNode(approvals=True, approval_wait=2.0), Asker()
    async with running(node):
        with pytest.raises(MeshError, match="Nobody answered the request to join in time"):
            await within(30, asker.ask(node))
        assert node.net.approvals is not None
        assert node.net.approvals.waiting() == []


async def test_a_node_that_takes_no_requests_says_only_that_it_wants_an_invite() -> None:
    node, asker = MeshNode(), Asker()
    async with running(node):
        with pytest.raises(MeshError, match="The mesh admits only invited nodes"):
            await within(20, asker.ask(node))
        assert not asker.waiting.is_set()


async def test_a_mesh_that_is_not_the_one_that_was_announced_is_not_joined() -> None:
    node, asker = MeshNode(approvals=True), Asker()
    async with running(node), TaskScope("askers") as scope:
        asked = scope.spawn(asker.ask(node, mesh="e" * 64), "asker")
        await within(20, asker.waiting.wait())
        assert node.net.approvals is not None
        node.net.approvals.approve(asker.id)
        with pytest.raises(MeshError, match="The invite is for another mesh"):
            await within(20, asked)


async def test_who_waits_or_is_approved_may_do_nothing_else() -> None:
    node, key = MeshNode(approvals=True), SigningKey.generate()
    async with running(node):
        assert node.net.approvals is not None
        async with stranger(node.net, key) as other:
            reply = await other.admit(encode(REQUEST))
            assert isinstance(reply, Refused)
            assert (reply.refusal.reason, reply.refusal.subject) == (Reason.PENDING, Subject.REQUEST)
            await _is_shut_out(await other.typed(StreamType.GOSSIP))
            await _is_shut_out(await other.typed(StreamType.HTTP))
        node.net.approvals.approve(fingerprint(key.node_id))
        async with stranger(node.net, key) as other:
            assert isinstance(await other.admit(encode(REQUEST)), Approved)
            await _is_shut_out(await other.typed(StreamType.ROUTES))
            await _is_shut_out(await other.typed(StreamType.RPC))


async def _is_shut_out(stream: PeerStream) -> None:
    with pytest.raises(ConnectionError, match="not_admitted"):
        await within(20, stream.read(1))
