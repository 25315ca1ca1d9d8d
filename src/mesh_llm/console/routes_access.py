"""Calls about who comes in: invites, nodes that knock, the public listing. All of them are for the node's user only."""

import msgspec

from mesh_llm.console.call import Access, Asked, Call, Desk, part
from mesh_llm.console.requests import ApprovalBody, InviteBody, PublicationBody
from mesh_llm.core.console_values import Approved, Publication, Waiting
from mesh_llm.core.management import InviteRecord


class Invites(msgspec.Struct, frozen=True, kw_only=True):
    """The invites that this node issued, newest first, without their tokens."""

    invites: tuple[InviteRecord, ...]


async def _invites(desk: Desk, _: Asked) -> Invites:
    return Invites(invites=tuple(desk.management.invites()))


async def _create_invite(desk: Desk, asked: Asked) -> InviteRecord:
    body = await asked.body(InviteBody)
    return await desk.management.create_invite(body.scope, body.lifetime_seconds, body.uses)


async def _revoke_invite(desk: Desk, asked: Asked) -> InviteRecord:
    return await desk.management.revoke_invite(asked.path("invite"))


async def _waiting(desk: Desk, _: Asked) -> Waiting:
    return Waiting(waiting=tuple(part(desk.parts.approvals, "nodes waiting to be let in").waiting()))


async def _approve(desk: Desk, asked: Asked) -> Approved:
    body = await asked.body(ApprovalBody)
    approvals, node = part(desk.parts.approvals, "nodes waiting to be let in"), asked.path("node")
    answered = await (approvals.approve(node, body.scope) if body.let_in else approvals.deny(node))
    return Approved(id=answered.id, let_in=body.let_in, name=answered.name, scope=answered.scope)


async def _publication(desk: Desk, _: Asked) -> Publication:
    return part(desk.parts.publisher, "public listing").publication()


async def _publish(desk: Desk, asked: Asked) -> Publication:
    body = await asked.body(PublicationBody)
    return await part(desk.parts.publisher, "public listing").publish(on=body.on)


CALLS = (
    Call(
        method="GET",
        path="/api/invites",
        name="invites",
        summary="The invites that this node issued, without their tokens.",
        handler=_invites,
        answer=Invites,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/invites",
        name="create_invite",
        summary="Issue an invite to this mesh; its token is told only now.",
        handler=_create_invite,
        answer=InviteRecord,
        access=Access.CHANGE,
        status=201,
        body=InviteBody,
    ),
    Call(
        method="DELETE",
        path="/api/invites/{invite}",
        name="revoke_invite",
        summary="Revoke an invite: everybody who came in by it is cut off.",
        handler=_revoke_invite,
        answer=InviteRecord,
        access=Access.CHANGE,
    ),
    Call(
        method="GET",
        path="/api/approvals",
        name="approvals",
        summary="Nodes near by that ask to be let in.",
        handler=_waiting,
        answer=Waiting,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/approvals/{node}",
        name="approve",
        summary="Let a waiting node in, or turn it away.",
        handler=_approve,
        answer=Approved,
        access=Access.CHANGE,
        body=ApprovalBody,
    ),
    Call(
        method="GET",
        path="/api/publication",
        name="publication",
        summary="Whether this mesh is listed publicly.",
        handler=_publication,
        answer=Publication,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/publication",
        name="publish",
        summary="List this mesh publicly, or take it off the list.",
        handler=_publish,
        answer=Publication,
        access=Access.CHANGE,
        body=PublicationBody,
    ),
)
