"""Who may join this mesh, who is in it, who may find it, and which hosts are trusted."""

from mesh_llm.console.auth import Access
from mesh_llm.console.calls import Backend, Call, CallRequest, Text, require
from mesh_llm.console.schema import (
    ApprovalBody,
    Approved,
    InviteBody,
    Invites,
    MemberRevoked,
    MemberScope,
    Publication,
    PublicationBody,
    ScopeBody,
    TrustForgotten,
    TrustList,
    Waiting,
)
from mesh_llm.net.admission.records import InviteRecord


async def _invites(backend: Backend, _: CallRequest) -> Invites:
    return Invites(invites=tuple(backend.management.invites()))


async def _create_invite(backend: Backend, request: CallRequest) -> InviteRecord:
    body = await request.body(InviteBody)
    return await backend.management.create_invite(body.scope, body.lifetime_seconds, body.uses)


async def _revoke_invite(backend: Backend, request: CallRequest) -> InviteRecord:
    return await backend.management.revoke_invite(request.path("invite"))


async def _grant(backend: Backend, request: CallRequest) -> MemberScope:
    body = await request.body(ScopeBody)
    return await backend.management.grant(request.path("node"), body.scope)


async def _revoke_member(backend: Backend, request: CallRequest) -> MemberRevoked:
    return await backend.management.revoke_member(request.path("node"))


async def _waiting(backend: Backend, _: CallRequest) -> Waiting:
    return Waiting(waiting=tuple(require(backend.capabilities.approvals, "requests to join").waiting()))


async def _approve(backend: Backend, request: CallRequest) -> Approved:
    body = await request.body(ApprovalBody)
    approvals, node = require(backend.capabilities.approvals, "requests to join"), request.path("node")
    answered = await (approvals.approve(node, body.scope) if body.approved else approvals.deny(node))
    return Approved(id=answered.id, approved=body.approved, name=answered.name, scope=answered.scope)


async def _publication(backend: Backend, _: CallRequest) -> Publication:
    return require(backend.capabilities.listing, "public listing").publication()


async def _publish(backend: Backend, request: CallRequest) -> Publication:
    body = await request.body(PublicationBody)
    return await require(backend.capabilities.listing, "public listing").publish(on=body.on, agreed=body.agreed)


async def _trust(backend: Backend, _: CallRequest) -> TrustList:
    return require(backend.capabilities.trust, "hosts that it checks").trust()


async def _forget_trust(backend: Backend, request: CallRequest) -> TrustForgotten:
    return await require(backend.capabilities.trust, "hosts that it checks").forget(
        request.path("node"), request.text(_FORGOTTEN)
    )


_FORGOTTEN = Text(name="model", text="About this model only.", required=False)

MEMBERSHIP_CALLS = (
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
        summary="Issue an invite to this mesh. Only this answer has its token.",
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
        summary="Revoke an invite: every node that it admitted is disconnected.",
        handler=_revoke_invite,
        answer=InviteRecord,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/members/{node}",
        name="grant",
        summary="Raise or lower what a member may do, by its name or the beginning of its key. Nothing restarts.",
        handler=_grant,
        answer=MemberScope,
        access=Access.CHANGE,
        body=ScopeBody,
    ),
    Call(
        method="DELETE",
        path="/api/members/{node}",
        name="revoke_member",
        summary="Cut a member off, in the whole mesh, by its name or the beginning of its key.",
        handler=_revoke_member,
        answer=MemberRevoked,
        access=Access.CHANGE,
    ),
    Call(
        method="GET",
        path="/api/approvals",
        name="approvals",
        summary="Nodes near by that ask to join.",
        handler=_waiting,
        answer=Waiting,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/approvals/{node}",
        name="approve",
        summary="Admit a waiting node, or deny its request.",
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
        summary="List this mesh publicly, or remove its listing.",
        handler=_publish,
        answer=Publication,
        access=Access.CHANGE,
        body=PublicationBody,
    ),
    Call(
        method="GET",
        path="/api/trust",
        name="trust",
        summary="The hosts that this node checked by canaries, which it distrusts, and the figures that it corrects.",
        handler=_trust,
        answer=TrustList,
    ),
    Call(
        method="DELETE",
        path="/api/trust/{node}",
        name="forget_trust",
        summary="Forget what this node found out about a host, by its name or the beginning of its key.",
        handler=_forget_trust,
        answer=TrustForgotten,
        query=(_FORGOTTEN,),
        access=Access.CHANGE,
    ),
)
