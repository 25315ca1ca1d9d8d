"""Who carries out which effect of the core."""

import structlog

from mesh_llm.core.effects import (
    AnyEffect,
    Disconnect,
    FetchModel,
    Finished,
    Lend,
    Notice,
    Publish,
    Rejoin,
    SendMessage,
    SetRoutes,
    StartEngine,
    StopEngine,
)
from mesh_llm.daemon.driver import Handler
from mesh_llm.daemon.engines import Engines
from mesh_llm.daemon.mesh import MeshEffects
from mesh_llm.daemon.outlook import Outlook

_log = structlog.get_logger(__name__)


def bind_effects(
    engines: Engines, mesh: MeshEffects, outlook: Outlook, lend: Handler, fetch: Handler, publish: Handler
) -> dict[type[AnyEffect], Handler]:
    """A handler for every kind of effect."""

    def start(effect: StartEngine) -> None:
        outlook.loading(effect)
        engines.start(effect)

    def set_routes(effect: SetRoutes) -> None:
        outlook.set_routes(effect)
        mesh.set_routes(effect)

    return {
        StartEngine: start,
        StopEngine: engines.stop,
        Lend: lend,
        FetchModel: fetch,
        SetRoutes: set_routes,
        SendMessage: mesh.send,
        Disconnect: mesh.disconnect,
        Rejoin: mesh.rejoin,
        Publish: publish,
        Notice: outlook.notices.add,
        Finished: lambda _: _log.info("everything has stopped"),
    }
