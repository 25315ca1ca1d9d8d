"""What the core is told of a user's settings and of the machine."""

import time

from mesh_llm import __version__
from mesh_llm.core.config import NodeConfig, Timings
from mesh_llm.core.ids import Incarnation
from mesh_llm.core.model import Role
from mesh_llm.daemon.machine import Machine, choose_models
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.mesh_net import MeshNet


def core_config(settings: Settings, net: MeshNet, machine: Machine, now: float) -> NodeConfig:
    """`now`: the daemon's own clock, by which the core's times are turned into times of day."""
    models = choose_models(settings, machine, joins=net.joins)
    clock = time.time()
    return NodeConfig(
        node=net.node_id,
        mesh=net.mesh_id,
        name=settings.node_name,
        role=Role.CLIENT if settings.client else Role.SERVE,
        version=__version__,
        incarnation=Incarnation(int(clock * 1000)),
        wanted=models.wanted,
        joins=net.joins,
        brings=bool(settings.later),
        options=models.options,
        split=settings.split,
        yields=settings.yields,
        publicity=settings.discovery.publicity,
        timings=Timings(listing_refresh=settings.discovery.period),
        epoch=clock - now,
        can_fetch=settings.fetch and machine.source is not None,
        shares=settings.give and machine.source is not None,
    )
