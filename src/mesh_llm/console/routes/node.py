"""The node itself: its state, notices, logs, last requests, settings and end."""

import asyncio

from mesh_llm.api.types import History
from mesh_llm.console.auth import Access
from mesh_llm.console.calls import TEXT, Backend, Call, CallRequest, Integer, require
from mesh_llm.console.schema import Decisions, LogNames, NoticeRecord, Owned, Reloaded, StopBody, Stopping
from mesh_llm.console.status import Status

_AFTER = Integer(name="after", text="Only those with a higher id.", lowest=0, highest=2**53, default=0)
_LIMIT = Integer(name="limit", text="At most so many of the newest.", lowest=1, highest=1000, default=100)
_LINES = Integer(name="lines", text="How many of the last lines.", lowest=1, highest=10_000, default=200)


async def _routing(backend: Backend, request: CallRequest) -> Decisions:
    decisions = require(backend.capabilities.decisions, "API")
    return Decisions(decisions=tuple(decisions(request.integer(_AFTER) or 0, request.integer(_LIMIT) or 1)))


async def _history(backend: Backend, _: CallRequest) -> History:
    return require(backend.capabilities.history, "API")()


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


async def _reload(backend: Backend, _: CallRequest) -> Reloaded:
    return await require(backend.capabilities.configuration, "configuration").reload()


async def _read_ownership(backend: Backend, _: CallRequest) -> Owned:
    return require(backend.capabilities.read_ownership, "owners")()


NODE_CALLS = (
    Call(
        method="POST",
        path="/api/owner/reload",
        name="reload_owner",
        summary="Read again whose node this is, and announce it.",
        handler=_read_ownership,
        answer=Owned,
        access=Access.CHANGE,
    ),
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
