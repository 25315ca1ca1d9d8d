"""Models: on disk, loaded, downloaded, planned, and their settings."""

from dataclasses import replace

from mesh_llm.console.auth import Access
from mesh_llm.console.calls import Backend, Call, CallRequest, Integer, Text, require
from mesh_llm.console.schema import (
    DownloadBody,
    DownloadRecord,
    Downloads,
    DropBody,
    Library,
    LoadBody,
    ModelAccepted,
    ModelSettingsBody,
    ModelSettingsShown,
    Reloaded,
)
from mesh_llm.console.status import StatusPromptCaches
from mesh_llm.core.performance.plan import PlanAnswer
from mesh_llm.core.types.errors import MeshError

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
