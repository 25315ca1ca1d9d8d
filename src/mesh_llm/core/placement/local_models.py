"""This node's own models: what is on disk, what is wanted here, what fits, and what is launched."""

from collections.abc import Mapping, Sequence

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.fit import COMFORTABLE_CONTEXT, DoesNotFit, plan_solo
from mesh_llm.core.placement.serving import Launches, Order, Origin
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel
from mesh_llm.core.types.events import DropRequested, EngineExited, EngineReady
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, ModelFacts, ModelKind, ModelStatus, Speed

_SERVED = {ModelKind.CHAT, ModelKind.EMBEDDING, ModelKind.RERANK}


class Refused(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model is not served here: `code` as in MeshError, `message` one sentence, `hint` what to do next."""

    code: str
    message: str
    hint: str = ""


class LocalModels:
    """Launches and the library they come from. Each method returns what must be done now."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self.capacity = Capacity()
        self.on_disk: dict[ModelName, ModelFacts] = {}
        self._helpers: dict[ModelName, ModelFacts] = {}
        self._drafts: Mapping[str, str] = {}
        self.wanted: list[ModelName] = list(dict.fromkeys(config.wanted))
        self.refused: dict[ModelName, str] = {}
        self.dropped: set[ModelName] = set()
        self.launches = Launches(config.restart, config.epoch)
        self.seed: ModelName | None = None
        self.lent_bytes = 0

    @property
    def free_bytes(self) -> int:
        """Memory that a further model could take."""
        return max(0, self.capacity.memory_bytes - self.launches.reserved_bytes() - self.lent_bytes)

    def offered_bytes(self, model: ModelName) -> int:
        """Memory that a split model could take here, whether or not it already does."""
        return max(0, self.capacity.memory_bytes - self.launches.reserved_bytes(besides=model))

    @property
    def excluded(self) -> frozenset[ModelName]:
        """Models that are not to be taken up by themselves: the user dropped them, or they failed here."""
        failed = (launch.model for launch in self.launches if launch.status is ModelStatus.FAILED)
        return frozenset((*self.dropped, *self.refused, *failed))

    def know(self, on_disk: Sequence[ModelFacts], drafts: Mapping[str, str]) -> None:
        """Take the library's content. Drafts are served only if the user names one; projectors never."""
        self._drafts = drafts
        self.on_disk = {facts.name: facts for facts in on_disk if facts.kind in _SERVED}
        self._helpers = {facts.name: facts for facts in on_disk if facts.kind is ModelKind.DRAFT}

    def measured(self, speed: Speed) -> None:
        """How fast this machine is."""
        self.capacity = msgspec.structs.replace(self.capacity, speed=speed)

    def check(
        self,
        model: ModelName,
        options: LaunchOptions | None,
        origin: Origin = Origin.USER,
        facts: ModelFacts | None = None,
    ) -> Order | Refused:
        """Work out how a model would be served here, beside what is served already; or why it cannot."""
        facts = facts or self.on_disk.get(model) or self._helpers.get(model)
        if facts is None:
            there = ", ".join(sorted(self.on_disk)[:8]) or "none"
            return Refused(
                code="model_not_found",
                message=f"{model} is not on this machine's disk.",
                hint=f"Models here: {there}. Put the GGUF file into ~/.models, or give its path.",
            )
        chosen = self.options_for(model) if options is None else options
        free = self.capacity.memory_bytes - self.launches.reserved_bytes(besides=model) - self.lent_bytes
        plan = plan_solo(facts, max(0, free), chosen, self.draft_of(chosen))
        if isinstance(plan, DoesNotFit):
            return Refused(code="does_not_fit", message=plan.message, hint=plan.hint)
        plan = self._with_found_draft(facts, plan, max(0, free), chosen)
        return Order(facts=facts, plan=plan, options=chosen, origin=origin)

    def _with_found_draft(
        self, facts: ModelFacts, plan: LaunchPlan, free_bytes: int, options: LaunchOptions
    ) -> LaunchPlan:
        """The plan with the draft that was found for the model, unless that takes slots or needed context from it."""
        draft = self.found_draft(facts.name, options)
        if draft is None:
            return plan
        both = plan_solo(facts, free_bytes, options, draft)
        if isinstance(both, DoesNotFit) or both.slots < plan.slots:
            return plan
        if both.context < min(plan.context, COMFORTABLE_CONTEXT):
            return plan
        return msgspec.structs.replace(both, draft=draft.name)

    def found_draft(self, model: ModelName, options: LaunchOptions) -> ModelFacts | None:
        """The draft that was found for a model, where the user named none and wants one."""
        if options.draft is not None or not options.use_draft:
            return None
        name = ModelName(self._drafts.get(model, ""))
        return self._helpers.get(name) or self.on_disk.get(name)

    def options_for(self, model: ModelName) -> LaunchOptions:
        """What the user fixed by hand; a draft is meant for the first model only."""
        options = self._config.options
        if options.draft is None or model in self._config.wanted[:1]:
            return options
        return msgspec.structs.replace(options, draft=None)

    def draft_of(self, options: LaunchOptions) -> ModelFacts | None:
        """The draft that options name, where it is here."""
        if options.draft is None or not options.use_draft:
            return None
        stem = options.draft.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".gguf")
        return self._helpers.get(ModelName(stem)) or self.on_disk.get(ModelName(stem))

    def fits(self, facts: ModelFacts, memory_bytes: int) -> bool:
        """Whether a model could be served in so much memory, with this node's own options."""
        return not isinstance(plan_solo(facts, memory_bytes, self.options_for(facts.name)), DoesNotFit)

    def load(
        self, model: ModelName, options: LaunchOptions | None, now: float, *, origin: Origin = Origin.USER
    ) -> list[AnyEffect]:
        """Serve a model, or say why not."""
        order = self.check(model, options, origin)
        if origin is Origin.USER and self.needs_group(model, order):
            return self._want_group(model, now)
        if isinstance(order, Refused):
            if self.launches.get(model) is None:
                self.refused[model] = order.message
            text = f"{order.message} {order.hint}".strip()
            return [Notice(level=NoticeLevel.ERROR, code=order.code, text=text, about=model)]
        self.refused.pop(model, None)
        self.dropped.discard(model)
        if origin is Origin.USER and model not in self.wanted:
            self.wanted.append(model)
        return self.launches.load(order, now)

    def needs_group(self, model: ModelName, order: Order | Refused) -> bool:
        """Whether a model that a user asks for is to be split: it does not fit here, or it was said so."""
        if not self.capacity.rpc_version or model not in self.on_disk or self.seed not in {None, model}:
            return False
        if isinstance(order, Refused):
            return order.code == "does_not_fit"
        return self._config.split.asked and model in self._config.wanted[:1]

    def _want_group(self, model: ModelName, now: float) -> list[AnyEffect]:
        self.seed = model
        self.refused.pop(model, None)
        self.dropped.discard(model)
        if model not in self.wanted:
            self.wanted.append(model)
        launch = self.launches.get(model)
        if launch is None or launch.status is not ModelStatus.FAILED:
            return []
        return self.launches.drop(model, 0.0, now, "it is tried again")

    def drop(self, event: DropRequested, now: float) -> list[AnyEffect]:
        """Stop serving a model because the user says so; it is not taken up again before the user asks for it."""
        self.dropped.add(event.model)
        if self.seed == event.model:
            self.seed = None
        self.refused.pop(event.model, None)
        if event.model in self.wanted:
            self.wanted.remove(event.model)
        return self.launches.drop(event.model, event.drain_seconds, now, "it was dropped")

    def due(self, now: float, *, paused: bool = False) -> list[AnyEffect]:
        """Restart engines that died, and try models that failed again, once their time has come.

        `paused`: no model is to be taken up at present.
        """
        effects = self.launches.due(now)
        for launch in self.launches.failed_and_due(now):
            if paused:
                self.launches.postpone(launch, "", now)
            elif launch.order.origin is Origin.MESH or launch.order.plan.split is not None:
                # Nothing speaks against it any more: the mesh, or the group, may take it up again.
                self.launches.forget(launch.model)
            else:
                order = self.check(launch.model, launch.order.options, launch.order.origin)
                if isinstance(order, Refused):
                    self.launches.postpone(launch, order.message, now)
                else:
                    effects += self.launches.retry(launch, order, now)
        return effects

    def ready(self, event: EngineReady, now: float) -> list[AnyEffect]:
        """An engine answers."""
        return self.launches.ready(event, now)

    def exited(self, event: EngineExited, now: float) -> list[AnyEffect]:
        """An engine ended."""
        return self.launches.exited(event, now)
