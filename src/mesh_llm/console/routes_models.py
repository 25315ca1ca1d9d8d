"""Calls about models: what could be served, serving it and not, fetching it, planning it."""

from mesh_llm.console.call import Access, Asked, Call, Desk, Integer, Text, part
from mesh_llm.console.requests import DownloadBody, DropBody, LoadBody
from mesh_llm.core.console_values import DownloadRecord, Downloads, Library, ModelAccepted
from mesh_llm.core.plan import PlanAnswer

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


CALLS = (
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
