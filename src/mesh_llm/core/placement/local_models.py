"""This node's models: what is on disk, what a user asked for here, what fits, and the launches."""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.fit import COMFORTABLE_CONTEXT, DoesNotFit, plan_solo
from mesh_llm.core.placement.launches import Launches, LaunchOrder, Origin
from mesh_llm.core.placement.offload import Pools, plan_launch
from mesh_llm.core.split.eligibility import Obstacle
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel
from mesh_llm.core.types.errors import size
from mesh_llm.core.types.events import (
    CapacityChanged,
    DropRequested,
    EngineExited,
    ModelUnavailable,
    PartRefused,
    RpcChanged,
    SettingsChanged,
)
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, ModelFacts, ModelKind, ModelStatus
from mesh_llm.core.types.model_settings import NO_SETTINGS, ModelSettings, SettingsByModel, settings_of

_STEP = 0.85
"""After a failed allocation a launch takes at most this part of what it took before."""

_RENEW_DRAIN = 30.0
"""Seconds for the requests of a model that does not fit other devices."""

_SERVED = {ModelKind.CHAT, ModelKind.EMBEDDING, ModelKind.RERANK}


class LoadRefused(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model is not served here: `code` as in MeshError, `message` one sentence, `hint` what to do next."""

    code: str
    message: str
    hint: str = ""


class LocalModels:
    """The models on disk and in use. Methods that return effects change the launches."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._options = config.options
        self._settings: SettingsByModel = config.models
        self._drafts_on_disk: dict[ModelName, ModelFacts] = {}
        self._draft_of: Mapping[str, str] = {}
        self.launches = Launches(config.restart, config.epoch)
        self.capacity = Capacity()
        self.rpc = RpcChanged(rpc_version="")
        """Why this node's engine cannot share models, where it cannot."""
        self.on_disk: dict[ModelName, ModelFacts] = {}
        self.wanted: list[ModelName] = list(dict.fromkeys(config.wanted))
        """The models that a user asked for here, in order."""
        self.refused: dict[ModelName, str] = {}
        """The models that a user asked for and that cannot be served here, with the reason."""
        self.dropped: set[ModelName] = set()
        """The models that a user dropped here."""
        self.resting: dict[ModelName, Origin] = {}
        """The models that were unloaded here until somebody asks for them, with why they were served."""
        self.group_model: ModelName | None = None
        """The model that was asked for here and that needs a split group."""
        self.group_origin = Origin.USER
        """Who asked for it: a user, or requests (`DEMAND`)."""
        self.shortages: dict[str, int] = {}
        """After an allocation failed: what a model takes at most of the devices, while they offer what they did."""
        self.lent_bytes = 0
        """Memory that a split model of another host takes here."""

    @property
    def free_bytes(self) -> int:
        """Memory that a further model could take."""
        return max(0, self.capacity.memory_bytes - self.launches.reserved_bytes() - self.lent_bytes)

    @property
    def free_host_bytes(self) -> int:
        """Main memory that a further model could take beside a GPU's."""
        return max(0, self.capacity.host_bytes - self.launches.reserved_host_bytes())

    def offered_bytes(self, model: ModelName, without: Collection[ModelName] = ()) -> int:
        """Memory for a split model here, including what that model already takes.

        `without`: models that are counted as not served.
        """
        free = max(0, self.capacity.memory_bytes - self.launches.reserved_bytes(model, *without))
        return min(free, self.shortages.get(self._shortage(model), free))

    @property
    def excluded(self) -> frozenset[ModelName]:
        """Models that the node does not take up unasked: a user dropped them, or they failed here."""
        failed = (launch.model for launch in self.launches if launch.status is ModelStatus.FAILED)
        return frozenset((*self.dropped, *self.refused, *failed))

    def know(self, on_disk: Sequence[ModelFacts], drafts: Mapping[str, str]) -> None:
        """Take the content of the disk. `drafts`: the draft model found for a model. Projectors are never served."""
        self._draft_of = drafts
        self.on_disk = {facts.name: facts for facts in on_disk if facts.kind in _SERVED}
        self._drafts_on_disk = {facts.name: facts for facts in on_disk if facts.kind is ModelKind.DRAFT}

    def check(
        self,
        model: ModelName,
        options: LaunchOptions | None,
        origin: Origin = Origin.USER,
        facts: ModelFacts | None = None,
        without: Collection[ModelName] = (),
    ) -> LaunchOrder | LoadRefused:
        """Plan a launch beside what is served already, or say why it is not possible. Changes nothing.

        `without`: models that are counted as not served.
        """
        facts = facts or self._facts(model)
        if facts is None:
            there = ", ".join(sorted(self.on_disk)[:8]) or "none"
            return LoadRefused(
                code="model_not_found",
                message=f"{model} is not on this machine's disk.",
                hint=f"Models here: {there}. Put the GGUF file into ~/.models, or give its path.",
            )
        chosen = self.options_for(model) if options is None else options
        pools = self._free(facts, (model, *without))
        plan = plan_launch(facts, pools, chosen, self.named_draft(chosen))
        if isinstance(plan, DoesNotFit):
            return LoadRefused(code="does_not_fit", message=plan.message, hint=plan.hint)
        if plan.offload is None:
            plan = self._with_found_draft(facts, plan, pools.device, chosen)
        return LaunchOrder(facts=facts, plan=plan, options=chosen, origin=origin)

    def _free(self, facts: ModelFacts, besides: Collection[ModelName]) -> Pools:
        """Memory for a model, beside everything that is served here except `besides`."""
        taken = self.launches.reserved_bytes(*besides) + self.lent_bytes
        pools = Pools.of(self.capacity, taken, self.launches.reserved_host_bytes(*besides))
        limit = self.shortages.get(self._shortage(facts.name), pools.device)
        return msgspec.structs.replace(pools, device=min(pools.device, limit))

    def share(self, event: RpcChanged, now: float) -> list[AnyEffect]:
        """The engine can share models from now on, or not any more. What a user wants may find a group now."""
        self.rpc = event
        self.capacity = msgspec.structs.replace(self.capacity, rpc_version=event.rpc_version)
        effects: list[AnyEffect] = []
        for model in [model for model in self.wanted if model in self.refused]:
            if self.needs_group(model, self.check(model, None)):
                effects += self.load(model, None, now)
        return effects

    def use_devices(self, event: CapacityChanged, now: float) -> list[AnyEffect]:
        """Models use other devices from now on. Each that runs starts again on them, between two of its requests.

        What a user wants and did not fit may fit now. A split model changes with its group's next layout.
        """
        self.capacity = msgspec.structs.replace(event.capacity, rpc_version=self.capacity.rpc_version)
        self.shortages.clear()
        effects: list[AnyEffect] = []
        for launch in self.launches.outdate(now, event.reason):
            order = self.check(launch.model, launch.order.options, launch.order.origin, launch.order.facts)
            if isinstance(order, LaunchOrder):
                self.launches.renew(launch, order)
                continue
            if launch.order.origin is Origin.USER and self.needs_group(launch.model, order):
                self.group_model, self.group_origin = launch.model, Origin.USER
            elif launch.order.origin is Origin.USER:
                self.refused[launch.model] = order.message
            effects += self.launches.drop(launch.model, _RENEW_DRAIN, now, order.message.rstrip("."))
        for model in [model for model in self.wanted if model in self.refused and model in self.on_disk]:
            if isinstance(self.check(model, None), LaunchOrder) and self.launches.get(model) is None:
                effects += self.load(model, None, now)
        return effects

    def use_settings(self, event: SettingsChanged, now: float) -> list[AnyEffect]:
        """Launches are made with other options from now on. What runs with others starts again, between two requests.

        A split model keeps its layout; its sizes change with its group's next one.
        """
        self._options, self._settings = event.options, event.models
        effects: list[AnyEffect] = []
        for launch in self.launches:
            present, wanted = launch.latest_order, self.options_for(launch.model)
            if present.plan.split is not None:
                sized = msgspec.structs.replace(present.options, draft_max=wanted.draft_max, engine=wanted.engine)
                order = present if sized == present.options else dataclasses.replace(present, options=sized)
            elif wanted == present.options:
                continue
            else:
                order = self.check(launch.model, wanted, present.origin, present.facts)
            if isinstance(order, LoadRefused):
                text = f"{launch.model} goes on with its present settings: {order.message} {order.hint}".strip()
                effects.append(Notice(level=NoticeLevel.WARNING, code="settings_unfit", text=text, about=launch.model))
            elif order is not present:
                self.launches.revise(launch, order, now, "its settings changed")
        for model in [model for model in self.wanted if model in self.refused and model in self.on_disk]:
            if isinstance(self.check(model, None), LaunchOrder) and self.launches.get(model) is None:
                effects += self.load(model, None, now)
        return effects

    def settings_of(self, model: ModelName) -> ModelSettings:
        """What the user set for one model, as it is now."""
        return settings_of(model, self._settings)

    @property
    def shareable(self) -> bool:
        """Whether this node can share models, or will soon."""
        return bool(self.capacity.rpc_version) or self.rpc.obstacle == Obstacle.BUILDING

    def fits(self, facts: ModelFacts, memory_bytes: int) -> bool:
        """Whether a model could be served within `memory_bytes`, with this node's options."""
        return not isinstance(plan_solo(facts, memory_bytes, self.options_for(facts.name)), DoesNotFit)

    def options_for(self, model: ModelName) -> LaunchOptions:
        """The user's options, with those for this model. A draft named for the node is for the first model only."""
        options, own = self._options, self.settings_of(model)
        if options.draft is not None and model not in self._config.wanted[:1]:
            options = msgspec.structs.replace(options, draft=None)
        return options if own is NO_SETTINGS else options.adapted(own)

    def named_draft(self, options: LaunchOptions) -> ModelFacts | None:
        """The draft that the user named, if it is on disk."""
        if options.draft is None or not options.use_draft:
            return None
        stem = options.draft.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".gguf")
        return self._facts(ModelName(stem))

    def found_draft(self, model: ModelName, options: LaunchOptions) -> ModelFacts | None:
        """The draft that was found for a model, if the user named none and wants one."""
        if options.draft is not None or not options.use_draft or options.engine.speculation == "eagle3":
            return None
        return self._facts(ModelName(self._draft_of.get(model, "")))

    def _facts(self, model: ModelName) -> ModelFacts | None:
        return self.on_disk.get(model) or self._drafts_on_disk.get(model)

    def _with_found_draft(
        self, facts: ModelFacts, plan: LaunchPlan, free_bytes: int, options: LaunchOptions
    ) -> LaunchPlan:
        """The plan with the found draft, unless the draft would cost slots or needed context."""
        draft = self.found_draft(facts.name, options)
        if draft is None:
            return plan
        both = plan_solo(facts, free_bytes, options, draft)
        if isinstance(both, DoesNotFit) or both.slots < plan.slots:
            return plan
        if both.context < min(plan.context, COMFORTABLE_CONTEXT):
            return plan
        return msgspec.structs.replace(both, draft=draft.name)

    def load(
        self, model: ModelName, options: LaunchOptions | None, now: float, *, origin: Origin = Origin.USER
    ) -> list[AnyEffect]:
        """Serve a model, wait for a split group, or report why neither is possible."""
        order = self.check(model, options, origin)
        if origin is Origin.USER and self.needs_group(model, order):
            return self._want_group(model, now)
        if isinstance(order, LoadRefused):
            if self.launches.get(model) is None:
                self.refused[model] = order.message
            text = f"{order.message} {order.hint}".strip()
            return [Notice(level=NoticeLevel.ERROR, code=order.code, text=text, about=model)]
        self.refused.pop(model, None)
        self.dropped.discard(model)
        self.resting.pop(model, None)
        if origin is Origin.USER and model not in self.wanted:
            self.wanted.append(model)
        return self.launches.load(order, now)

    def needs_group(self, model: ModelName, order: LaunchOrder | LoadRefused) -> bool:
        """Whether a model that a user asks for is to be split: it does not fit the devices here, or the user said so.

        A model that needs main memory beside the devices is served alone while no group can be formed.
        """
        if not self.shareable or model not in self.on_disk or self.group_model not in {None, model}:
            return False
        if isinstance(order, LoadRefused):
            return order.code == "does_not_fit"
        by_hand = order.options.gpu_layers is not None or order.options.cpu_moe is not None
        offload = order.plan.offload
        if offload is not None and offload.divided(order.facts.layers) and not by_hand:
            return True
        return self._config.split.asked and model in self._config.wanted[:1]

    def _want_group(self, model: ModelName, now: float) -> list[AnyEffect]:
        self.group_model, self.group_origin = model, Origin.USER
        self.refused.pop(model, None)
        self.dropped.discard(model)
        if model not in self.wanted:
            self.wanted.append(model)
        launch = self.launches.get(model)
        if launch is None or launch.status is not ModelStatus.FAILED:
            return []
        return self.launches.drop(model, 0.0, now, "it is tried again")

    def end_group(self, model: ModelName) -> None:
        """The model is not to be split any more, unless it runs already."""
        if self.group_model == model and self.launches.get(model) is None:
            self.group_model = None
            if model in self.wanted:
                self.wanted.remove(model)

    def unavailable(self, event: ModelUnavailable) -> list[AnyEffect]:
        """A model that the user gave cannot be had, or can be had again. Says so once for each reason."""
        before = self.refused.get(event.model, "")
        if event.model in self.dropped or self.launches.get(event.model) is not None or event.reason == before:
            return []
        if not event.reason:
            del self.refused[event.model]
            return []
        self.refused[event.model] = event.reason
        text = f"{event.model} cannot be served here: {event.reason}"
        return [Notice(level=NoticeLevel.ERROR, code="model_unavailable", text=text, about=event.model)]

    def exited(self, event: EngineExited, now: float) -> list[AnyEffect]:
        """An engine ended. If a device gave it too little memory, it is started again with less at once."""
        return self.launches.exited(event, now, self._smaller)

    def _smaller(self, order: LaunchOrder) -> LaunchOrder | None:
        """The launch with less of the devices' memory. That is remembered while they offer what they do now.

        None for a split model: this node offers it less from now on, so its group divides it anew.
        """
        taken = order.plan.memory_bytes
        if not taken:
            return None
        self.shortages[self._shortage(order.facts.name)] = int(taken * _STEP)
        if order.plan.split is not None:
            return None
        found = self.check(order.facts.name, order.options, order.origin)
        return None if isinstance(found, LoadRefused) else found

    def part_refused(self, event: PartRefused) -> list[AnyEffect]:
        """This node's part of another node's model got too little memory: offer that model less from now on."""
        offered = int(event.memory_bytes * _STEP)
        if not offered or self.shortages.get(self._shortage(event.model), offered + 1) <= offered:
            return []
        self.shortages[self._shortage(event.model)] = offered
        text = (
            f"{event.model} got too little memory from the device here for its part of {size(event.memory_bytes)}, so "
            f"this node offers it {size(offered)} from now on, and its host divides the layers anew."
        )
        return [Notice(level=NoticeLevel.WARNING, code="model_stepped_down", text=text, about=event.model)]

    def _shortage(self, model: ModelName) -> str:
        return "\0".join((model, str(self.capacity.memory_bytes), *self.capacity.devices))

    def rest(self, model: ModelName, drain_seconds: float, now: float, why: str) -> list[AnyEffect]:
        """Unload a model until somebody asks for it. The mesh does not want it meanwhile."""
        launch = self.launches.get(model)
        if launch is None:
            return []
        self.resting[model] = launch.order.origin
        if self.group_model == model:
            self.group_model = None
        if model in self.wanted:
            self.wanted.remove(model)
        return self.launches.drop(model, drain_seconds, now, why)

    def take_up(self, model: ModelName, now: float) -> list[AnyEffect]:
        """Serve a model because a request asks for it. What a user asked for before is the user's again."""
        origin = self.resting.pop(model, Origin.DEMAND)
        return self.load(model, None, now, origin=Origin.DEMAND if origin is Origin.MESH else origin)

    def drop(self, event: DropRequested, now: float) -> list[AnyEffect]:
        """A user drops a model. It is not taken up again before a user asks for it.

        With `rest` it is only unloaded: a request loads it again.
        """
        if event.rest:
            return self.rest(event.model, event.drain_seconds, now, "it was unloaded")
        self.resting.pop(event.model, None)
        self.dropped.add(event.model)
        if self.group_model == event.model:
            self.group_model = None
        self.refused.pop(event.model, None)
        if event.model in self.wanted:
            self.wanted.remove(event.model)
        return self.launches.drop(event.model, event.drain_seconds, now, "it was dropped")

    def due(self, now: float, in_flight: Mapping[str, int], *, paused: bool = False) -> list[AnyEffect]:
        """Restart engines whose time has come, and retry failed models whose pause is over.

        `in_flight`: requests at this node's engines, by model. `paused`: no failed model is to be taken up at present.
        """
        effects = self.launches.due(now, in_flight)
        for launch in self.launches.retryable(now):
            if paused:
                self.launches.postpone(launch, "", now)
            elif launch.order.origin is not Origin.USER or launch.order.plan.split is not None:
                # It is no longer excluded: the mesh, or the split group, may take it up again.
                self.launches.forget(launch.model)
            else:
                order = self.check(launch.model, launch.order.options, launch.order.origin)
                if isinstance(order, LoadRefused):
                    self.launches.postpone(launch, order.message, now)
                else:
                    effects += self.launches.retry(launch, order, now)
        return effects
