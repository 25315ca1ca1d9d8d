"""The calls of the management API: who may join, models, the node, activity, sessions."""

import asyncio
from dataclasses import replace

from mesh_llm.api.types import History
from mesh_llm.console.auth import CODE_SECONDS, SESSION_SECONDS, Access, Caller
from mesh_llm.console.calls import TEXT, Backend, Call, CallRequest, Integer, Text, WithHeaders, require
from mesh_llm.console.schema import (
    ApprovalBody,
    Approved,
    Decisions,
    DownloadBody,
    DownloadRecord,
    Downloads,
    DropBody,
    Health,
    InviteBody,
    Invites,
    Library,
    LoadBody,
    LogNames,
    MemberRevoked,
    MemberScope,
    ModelAccepted,
    ModelSettingsBody,
    ModelSettingsShown,
    NoticeRecord,
    Publication,
    PublicationBody,
    Reloaded,
    ScopeBody,
    SessionKey,
    SessionState,
    SignedOut,
    SignInBody,
    SignInLink,
    Status,
    StatusPromptCaches,
    StopBody,
    Stopping,
    Waiting,
)
from mesh_llm.core.performance.plan import PlanAnswer
from mesh_llm.core.types.errors import MeshError
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
)


_AFTER = Integer(name="after", text="Only those with a higher id.", lowest=0, highest=2**53, default=0)
_LIMIT = Integer(name="limit", text="At most so many of the newest.", lowest=1, highest=1000, default=100)


async def _routing(backend: Backend, request: CallRequest) -> Decisions:
    decisions = require(backend.capabilities.decisions, "API")
    return Decisions(decisions=tuple(decisions(request.integer(_AFTER) or 0, request.integer(_LIMIT) or 1)))


async def _history(backend: Backend, _: CallRequest) -> History:
    return require(backend.capabilities.history, "API")()


ACTIVITY_CALLS = (
    Call(
        method="GET",
        path="/api/routing",
        name="routing",
        summary="How the last requests were routed, why, and how they ended; newest first.",
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


async def _clear_prompt_caches(backend: Backend, _: CallRequest) -> StatusPromptCaches:
    return await require(backend.capabilities.clear_prompt_caches, "saved prompt caches")()


async def _library(backend: Backend, _: CallRequest) -> Library:
    return require(backend.capabilities.library, "models of its own")()


async def _load(backend: Backend, request: CallRequest) -> ModelAccepted:
    body = await request.body(LoadBody)
    return await backend.management.load(body.model)


async def _drop(backend: Backend, request: CallRequest) -> ModelAccepted:
    body = await request.body(DropBody)
    return ModelAccepted(model=await backend.management.drop(body.model, body.drain_seconds, rest=body.rest))


async def _plan(backend: Backend, request: CallRequest) -> PlanAnswer:
    return await require(backend.capabilities.plan, "plans")(request.text(_MODEL), request.integer(_CONTEXT))


async def _downloads(backend: Backend, _: CallRequest) -> Downloads:
    return Downloads(downloads=tuple(require(backend.capabilities.downloader, "downloads").records()))


async def _download(backend: Backend, request: CallRequest) -> DownloadRecord:
    body = await request.body(DownloadBody)
    return await require(backend.capabilities.downloader, "downloads").start(body.model, load=body.load, hub=body.hub)


async def _cancel(backend: Backend, request: CallRequest) -> DownloadRecord:
    return await require(backend.capabilities.downloader, "downloads").cancel(request.path("download"))


_SETTINGS_OF = Text(name="model", text="A model's name.")


async def _model_settings(backend: Backend, request: CallRequest) -> ModelSettingsShown:
    return require(backend.capabilities.configuration, "configuration").model(request.text(_SETTINGS_OF))


async def _change_settings(backend: Backend, request: CallRequest) -> Reloaded:
    body = await request.body(ModelSettingsBody)
    control = require(backend.capabilities.configuration, "configuration")
    try:
        return await control.change_model(body.model, body.settings)
    except MeshError as error:
        # The request has the form that the API describes; what it asks for cannot be set.
        raise (replace(error, status=409) if error.status == 400 else error) from None


async def _reload(backend: Backend, _: CallRequest) -> Reloaded:
    return await require(backend.capabilities.configuration, "configuration").reload()


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
        summary="Serve one more model on this node. The status shows its progress.",
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
        summary="How a model would run if it were loaded now. Nothing is loaded.",
        handler=_plan,
        answer=PlanAnswer,
        query=(_MODEL, _CONTEXT),
    ),
    Call(
        method="DELETE",
        path="/api/prompt-caches",
        name="clear_prompt_caches",
        summary="Delete the saved prompt caches; the answer says what there was.",
        handler=_clear_prompt_caches,
        answer=StatusPromptCaches,
        access=Access.CHANGE,
    ),
    Call(
        method="GET",
        path="/api/model-settings",
        name="model_settings",
        summary="What the user set for one model in the configuration files.",
        handler=_model_settings,
        answer=ModelSettingsShown,
        access=Access.CHANGE,
        query=(_SETTINGS_OF,),
    ),
    Call(
        method="POST",
        path="/api/model-settings",
        name="change_model_settings",
        summary="Write settings of one model to the user's configuration file, and read it again.",
        handler=_change_settings,
        answer=Reloaded,
        access=Access.CHANGE,
        body=ModelSettingsBody,
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
        summary="Fetch a model to this node's disk. Downloads and events show its progress.",
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
        summary="Stop a download. What has arrived is kept, and the next download continues there.",
        handler=_cancel,
        answer=DownloadRecord,
        access=Access.CHANGE,
    ),
)


_LINES = Integer(name="lines", text="How many of the last lines.", lowest=1, highest=10_000, default=200)


async def _status(backend: Backend, _: CallRequest) -> Status:
    return backend.management.status()


async def _notices(backend: Backend, request: CallRequest) -> list[NoticeRecord]:
    return backend.management.notices(request.integer(_AFTER) or 0)


async def _log_names(backend: Backend, _: CallRequest) -> LogNames:
    return LogNames(logs=tuple(await asyncio.to_thread(backend.logs.names)))


async def _log(backend: Backend, request: CallRequest) -> str:
    name, lines = request.path("name"), request.integer(_LINES) or 1
    return await asyncio.to_thread(backend.logs.tail, name, lines)


async def _stop(backend: Backend, request: CallRequest) -> Stopping:
    body = await request.body(StopBody)
    await backend.management.stop(body.drain_seconds)
    return Stopping()


NODE_CALLS = (
    Call(
        method="POST",
        path="/api/config/reload",
        name="reload_config",
        summary="Read the configuration files again, and change what can change while the node runs.",
        handler=_reload,
        answer=Reloaded,
        access=Access.CHANGE,
    ),
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
        summary="The names of the logs of the node and its engines.",
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
"""Before the code in a link. Browsers do not send what follows `#`, so no proxy logs it."""


async def _health(_: Backend, __: CallRequest) -> Health:
    return Health()


async def _state(backend: Backend, _: CallRequest) -> SessionState:
    return SessionState(sessions=len(backend.sessions))


async def _sign_in(backend: Backend, request: CallRequest) -> WithHeaders:
    body = await request.body(SignInBody)
    proved = request.caller is not Caller.ANYBODY
    if not body.code and not proved:
        raise MeshError(
            code="sign_in_required",
            message="This console opens with a link.",
            hint="Type mesh-llm console on the node's machine.",
            status=401,
        )
    session = backend.sessions.open() if proved else backend.sessions.redeem(body.code)
    return WithHeaders(
        SessionKey(key=session.key), {"set-cookie": _cookie(backend, request, session.cookie, SESSION_SECONDS)}
    )


async def _sign_out(backend: Backend, request: CallRequest) -> WithHeaders:
    cookie = request.http.cookies.get(backend.cookie, "")
    before = len(backend.sessions)
    backend.sessions.end(cookie)
    ended = SignedOut(ended=before - len(backend.sessions))
    return WithHeaders(ended, {"set-cookie": _cookie(backend, request, "", 0)})


async def _sign_out_all(backend: Backend, _: CallRequest) -> SignedOut:
    return SignedOut(ended=backend.sessions.end_all())


async def _link(backend: Backend, _: CallRequest) -> SignInLink:
    return sign_in_link(backend)


def sign_in_link(backend: Backend) -> SignInLink:
    """A new link. Raises MeshError(no_page)."""
    if not backend.pages:
        raise MeshError(
            code="no_page",
            message="This node was started with --headless: it has no page.",
            hint="Start it without --headless, or use mesh-llm status --watch.",
            status=409,
        )
    code = backend.sessions.new_code()
    return SignInLink(
        urls=tuple(f"{page}{CODE_MARK}{code}" for page in backend.pages), code=code, expires_seconds=CODE_SECONDS
    )


def _cookie(backend: Backend, request: CallRequest, value: str, seconds: float) -> str:
    """A session's Set-Cookie header. `Secure` if the page came over TLS."""
    secure = "; Secure" if request.http.headers.get("origin", "").lower().startswith("https:") else ""
    return f"{backend.cookie}={value}; Path=/; Max-Age={seconds:.0f}; HttpOnly; SameSite=Strict{secure}"


SESSION_CALLS = (
    Call(
        method="GET",
        path="/api/health",
        name="health",
        summary="Whether a node is here. Everybody on this machine may ask.",
        handler=_health,
        answer=Health,
        access=Access.OPEN,
    ),
    Call(
        method="GET",
        path="/api/session",
        name="session",
        summary="Whether the request shows an open session, or another proof of its user.",
        handler=_state,
        answer=SessionState,
        access=Access.CHANGE,
    ),
    Call(
        method="POST",
        path="/api/session",
        name="sign_in",
        summary="Open a session with the code of a link, or with another proof of the user.",
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
        summary="End the session of the request.",
        handler=_sign_out,
        answer=SignedOut,
        access=Access.CHANGE,
    ),
    Call(
        method="DELETE",
        path="/api/sessions",
        name="sign_out_all",
        summary="End all sessions of browsers, and cancel all unused links.",
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
