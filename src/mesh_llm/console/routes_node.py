"""Calls about the node as a whole: its status, what happened, its logs, its end."""

from mesh_llm.console.call import TEXT, Access, Asked, Call, Desk, Integer, off_loop
from mesh_llm.console.requests import StopBody
from mesh_llm.core.console_values import LogNames, Stopping
from mesh_llm.core.management import NoticeRecord
from mesh_llm.core.status import Status

_AFTER = Integer(name="after", text="Only those with a higher id.", lowest=0, highest=2**53, default=0)
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


CALLS = (
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
