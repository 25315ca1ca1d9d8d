"""Calls about who comes in: invites, nodes that knock, the public listing. All of them are for the node's user only.

Calls about the front door's requests: how they were routed and why, and the last hour in numbers.

Calls about models: what could be served, serving it and not, fetching it, planning it.

Calls about the node as a whole: its status, what happened, its logs, its end.

Calls about who is signed in: what anybody may see, links and sessions for the page. See `sessions`.
"""

from mesh_llm.console.calls import (
    TEXT,
    Access,
    ApprovalBody,
    Asked,
    Asker,
    Call,
    Desk,
    DownloadBody,
    DropBody,
    Integer,
    InviteBody,
    LoadBody,
    PublicationBody,
    SignInBody,
    StopBody,
    Text,
    WithHeaders,
    off_loop,
    part,
)
from mesh_llm.console.sessions import CODE_SECONDS, SESSION_SECONDS
from mesh_llm.console.status import (
    Approved,
    Decisions,
    DownloadRecord,
    Downloads,
    Health,
    Invites,
    Library,
    LogNames,
    ModelAccepted,
    NoticeRecord,
    Publication,
    SessionKey,
    SessionState,
    SignedOut,
    SignInLink,
    Status,
    Stopping,
    Waiting,
)
from mesh_llm.core.performance.plan import PlanAnswer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.status import History
from mesh_llm.net.admission.records import InviteRecord


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
    answered = await (approvals.approve(node, body.scope) if body.approved else approvals.deny(node))
    return Approved(id=answered.id, approved=body.approved, name=answered.name, scope=answered.scope)


async def _publication(desk: Desk, _: Asked) -> Publication:
    return part(desk.parts.publisher, "public listing").publication()


async def _publish(desk: Desk, asked: Asked) -> Publication:
    body = await asked.body(PublicationBody)
    return await part(desk.parts.publisher, "public listing").publish(on=body.on)


ACCESS_CALLS = (
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


_AFTER = Integer(name="after", text="Only those with a higher id.", lowest=0, highest=2**53, default=0)
_LIMIT = Integer(name="limit", text="At most so many of the newest.", lowest=1, highest=1000, default=100)


async def _routing(desk: Desk, asked: Asked) -> Decisions:
    activity = part(desk.parts.activity, "front door")
    return Decisions(decisions=tuple(activity.decisions(asked.integer(_AFTER) or 0, asked.integer(_LIMIT) or 1)))


async def _history(desk: Desk, _: Asked) -> History:
    return part(desk.parts.activity, "front door").history()


ACTIVITY_CALLS = (
    Call(
        method="GET",
        path="/api/routing",
        name="routing",
        summary="How the last requests were routed, why, and what came of them; newest first.",
        handler=_routing,
        answer=Decisions,
        access=Access.READ,
        query=(_AFTER, _LIMIT),
    ),
    Call(
        method="GET",
        path="/api/history",
        name="history",
        summary="Requests, tokens and latencies of the last hour, a bucket a minute.",
        handler=_history,
        answer=History,
    ),
)


_MODEL = Text(name="model", text="A name on this node's disk or in the catalogue.")
_CONTEXT = Integer(name="ctx_size", text="Tokens for each request.", lowest=1, highest=2**31 - 1, default=None)


async def _library(desk: Desk, _: Asked) -> Library:
    return await part(desk.parts.shelf, "models of its own").library()


async def _load(desk: Desk, asked: Asked) -> ModelAccepted:
    body = await asked.body(LoadBody)
    return ModelAccepted(model=await desk.management.load(body.model))


async def _drop(desk: Desk, asked: Asked) -> ModelAccepted:
    body = await asked.body(DropBody)
    return ModelAccepted(model=await desk.management.drop(body.model, body.drain_seconds))


async def _plan(desk: Desk, asked: Asked) -> PlanAnswer:
    return await part(desk.parts.planner, "plans").plan(asked.text(_MODEL), asked.integer(_CONTEXT))


async def _downloads(desk: Desk, _: Asked) -> Downloads:
    return Downloads(downloads=tuple(part(desk.parts.downloader, "downloads").records()))


async def _download(desk: Desk, asked: Asked) -> DownloadRecord:
    body = await asked.body(DownloadBody)
    return await part(desk.parts.downloader, "downloads").start(body.model, load=body.load, hub=body.hub)


async def _cancel(desk: Desk, asked: Asked) -> DownloadRecord:
    return await part(desk.parts.downloader, "downloads").cancel(asked.path("download"))


MODELS_CALLS = (
    Call(
        method="GET",
        path="/api/library",
        name="library",
        summary="Models on this node's disk and in the catalogue, and whether and where each would run.",
        handler=_library,
        answer=Library,
    ),
    Call(
        method="POST",
        path="/api/load",
        name="load",
        summary="Serve one more model on this node; the status tells how it goes on.",
        handler=_load,
        answer=ModelAccepted,
        access=Access.CHANGE,
        status=202,
        body=LoadBody,
    ),
    Call(
        method="POST",
        path="/api/drop",
        name="drop",
        summary="Stop serving a model on this node, once its running answers have ended.",
        handler=_drop,
        answer=ModelAccepted,
        access=Access.CHANGE,
        status=202,
        body=DropBody,
    ),
    Call(
        method="GET",
        path="/api/plan",
        name="plan",
        summary="What would become of a model if it were loaded now, without doing anything.",
        handler=_plan,
        answer=PlanAnswer,
        query=(_MODEL, _CONTEXT),
    ),
    Call(
        method="GET",
        path="/api/downloads",
        name="downloads",
        summary="Downloads under way and ended, with their progress.",
        handler=_downloads,
        answer=Downloads,
    ),
    Call(
        method="POST",
        path="/api/downloads",
        name="download",
        summary="Fetch a model to this node's disk; its progress is told by downloads and the events.",
        handler=_download,
        answer=DownloadRecord,
        access=Access.CHANGE,
        status=202,
        body=DownloadBody,
    ),
    Call(
        method="DELETE",
        path="/api/downloads/{download}",
        name="cancel_download",
        summary="Stop a download; what has arrived is kept, and the next one goes on there.",
        handler=_cancel,
        answer=DownloadRecord,
        access=Access.CHANGE,
    ),
)


_LINES = Integer(name="lines", text="How many of the last lines.", lowest=1, highest=10_000, default=200)


async def _status(desk: Desk, _: Asked) -> Status:
    return desk.management.status()


async def _notices(desk: Desk, asked: Asked) -> list[NoticeRecord]:
    return desk.management.notices(asked.integer(_AFTER) or 0)


async def _log_names(desk: Desk, _: Asked) -> LogNames:
    return LogNames(logs=tuple(await off_loop(desk.logs.names)))


async def _log(desk: Desk, asked: Asked) -> str:
    name, lines = asked.path("name"), asked.integer(_LINES) or 1
    return await off_loop(lambda: desk.logs.tail(name, lines))


async def _stop(desk: Desk, asked: Asked) -> Stopping:
    body = await asked.body(StopBody)
    await desk.management.stop(body.drain_seconds)
    return Stopping()


NODE_CALLS = (
    Call(
        method="GET",
        path="/api/status",
        name="status",
        summary="The node's whole state: models, peers, split, requests.",
        handler=_status,
        answer=Status,
    ),
    Call(
        method="GET",
        path="/api/notices",
        name="notices",
        summary="What happened, oldest first; old notices are forgotten.",
        handler=_notices,
        answer=list[NoticeRecord],
        query=(_AFTER,),
    ),
    Call(
        method="GET",
        path="/api/logs",
        name="logs",
        summary="The logs there are, of the node and of its engines.",
        handler=_log_names,
        answer=LogNames,
    ),
    Call(
        method="GET",
        path="/api/logs/{name}",
        name="log",
        summary="The last lines of a log.",
        handler=_log,
        query=(_LINES,),
        media=TEXT,
    ),
    Call(
        method="POST",
        path="/api/stop",
        name="stop",
        summary="End the node.",
        handler=_stop,
        answer=Stopping,
        access=Access.CHANGE,
        status=202,
        body=StopBody,
    ),
)


CODE_MARK = "#sign-in="
"""Before the code in a link: what follows # is not sent to any server, and in no log of a proxy."""


async def _health(_: Desk, __: Asked) -> Health:
    return Health()


async def _state(desk: Desk, _: Asked) -> SessionState:
    return SessionState(sessions=len(desk.sessions))


async def _sign_in(desk: Desk, asked: Asked) -> WithHeaders:
    body = await asked.body(SignInBody)
    known = asked.asker is not Asker.ANYBODY
    if not body.code and not known:
        raise MeshError(
            code="sign_in_required",
            message="This console opens with a link.",
            hint="Type mesh-llm console on the node's machine.",
            status=401,
        )
    session = desk.sessions.open() if known else desk.sessions.redeem(body.code)
    return WithHeaders(
        SessionKey(key=session.key), {"set-cookie": _cookie(desk, asked, session.cookie, SESSION_SECONDS)}
    )


async def _sign_out(desk: Desk, asked: Asked) -> WithHeaders:
    cookie = asked.cookie(desk.cookie)
    before = len(desk.sessions)
    desk.sessions.end(cookie)
    ended = SignedOut(ended=before - len(desk.sessions))
    return WithHeaders(ended, {"set-cookie": _cookie(desk, asked, "", 0)})


async def _sign_out_all(desk: Desk, _: Asked) -> SignedOut:
    return SignedOut(ended=desk.sessions.end_all())


async def _link(desk: Desk, _: Asked) -> SignInLink:
    return sign_in_link(desk)


def sign_in_link(desk: Desk) -> SignInLink:
    """A new link. Raises MeshError(no_page)."""
    if not desk.pages:
        raise MeshError(
            code="no_page",
            message="This node was started with --headless: it has no page.",
            hint="Start it without --headless, or use mesh-llm status --watch.",
            status=409,
        )
    code = desk.sessions.new_code()
    return SignInLink(
        urls=tuple(f"{page}{CODE_MARK}{code}" for page in desk.pages), code=code, expires_seconds=CODE_SECONDS
    )


def _cookie(desk: Desk, asked: Asked, value: str, seconds: float) -> str:
    """The cookie of a session; only over TLS, where the page came that way."""
    secure = "; Secure" if (asked.header("origin") or "").lower().startswith("https:") else ""
    return f"{desk.cookie}={value}; Path=/; Max-Age={seconds:.0f}; HttpOnly; SameSite=Strict{secure}"


SESSION_CALLS = (
    Call(
        method="GET",
        path="/api/health",
        name="health",
        summary="A node is here. Anybody on this machine may ask.",
        handler=_health,
        answer=Health,
        access=Access.OPEN,
    ),
    Call(
        method="GET",
        path="/api/session",
        name="session",
        summary="Whether the request shows an open session, or is its user's in another way.",
        handler=_state,
        answer=SessionState,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/session",
        name="sign_in",
        summary="Open a session with the code of a link, or with what shows the user in another way.",
        handler=_sign_in,
        answer=SessionKey,
        access=Access.OPEN,
        status=201,
        body=SignInBody,
    ),
    Call(
        method="DELETE",
        path="/api/session",
        name="sign_out",
        summary="End the session that the request shows.",
        handler=_sign_out,
        answer=SignedOut,
        access=Access.CHANGE,
    ),
    Call(
        method="DELETE",
        path="/api/sessions",
        name="sign_out_all",
        summary="End all sessions of browsers, and make all links useless that were not used.",
        handler=_sign_out_all,
        answer=SignedOut,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/sign-in-links",
        name="create_sign_in_link",
        summary="Make a link that opens the page signed in, once, within 15 minutes.",
        handler=_link,
        answer=SignInLink,
        access=Access.CHANGE,
        status=201,
    ),
)
