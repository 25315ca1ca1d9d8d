"""Carries a node's part in a split model into what it runs: the host's launch, what is lent, and what is told."""

from collections.abc import Container, Sequence

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.placement.launches import LaunchOrder, Origin
from mesh_llm.core.placement.local_models import LocalModels
from mesh_llm.core.split.election import elsewhere
from mesh_llm.core.split.group import Splits, SplitSituation
from mesh_llm.core.types.announcement import Member, SplitState
from mesh_llm.core.types.effects import AnyEffect, Lend, Notice, NoticeLevel
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, Lending, ModelFacts, ModelStatus, SplitLayout

_UNIT = 10**9


class SplitController:
    """Between `Splits`, which decides, and the launches. Each method returns what must be done now."""

    def __init__(self, config: NodeConfig, models: LocalModels) -> None:
        self._config = config
        self._models = models
        self._splits = Splits(config)
        self._ordered: LaunchPlan | None = None
        self._lending: Lending | None = None
        self._said = ""
        self._odd: dict[NodeId, str] = {}
        self.changed = False
        """Whether the last look changed the word."""
        self.unobtainable: Container[ModelName] = set()
        """Models whose files could not be had."""

    # What may be read.

    @property
    def word(self) -> SplitState | None:
        """What to announce."""
        return self._splits.word

    @property
    def lending(self) -> Lending | None:
        """What this node computes for another one."""
        return self._lending

    @property
    def waiting(self) -> dict[ModelName, str]:
        """The model that this node's user wants and that cannot be served yet, with the reason."""
        model = self._splits.model
        if model is None or model != self._models.group_model or not self._splits.waiting:
            return {}
        return {model: self._splits.waiting}

    @property
    def busy(self) -> bool:
        """Whether this node takes part in a split model that runs."""
        return self._lending is not None or self._ordered is not None

    @property
    def helps(self) -> bool:
        """Whether this node is in a group, running or not."""
        return self._splits.model is not None

    def layout(self, members: Sequence[Member]) -> tuple[ModelName, SplitLayout] | None:
        """A split model that runs: this node's own, or else the first by name that others announce."""
        own = self._splits.layout
        if own is not None and self._splits.model is not None:
            return (self._splits.model, own) if own.workers else None
        words = [member.announcement.split for member in members if not member.suspect]
        found = [(word.model, layout) for word in words if word is not None and (layout := word.layout())]
        return min(
            (entry for entry in found if entry[1].workers), key=lambda entry: (entry[0], -entry[1].term), default=None
        )

    def deadline(self) -> float | None:
        """When to look again, if nothing happens before."""
        return self._splits.deadline()

    def asked(self, members: Sequence[Member]) -> frozenset[ModelName]:
        """Models that are to be split, or wait for it: nobody takes them up whole meanwhile."""
        words = [member.announcement.split for member in members]
        own = self._splits.model
        return frozenset([*(word.model for word in words if word is not None and word.asked), *([own] if own else [])])

    # What happens.

    def grant(self, *, granted: bool) -> None:
        """This node's own admission lets it share models, or does not."""
        self._splits.granted = granted

    def failed(
        self, node: NodeId, model: ModelName, reason: str, names: Sequence[Member], now: float
    ) -> list[AnyEffect]:
        """The tunnel to a worker failed."""
        if self._ordered is None or self._ordered.model != model:
            return []
        self._splits.failed(node, now)
        text = f"{_name(node, names)} was lost for {model}: {reason.rstrip('.') or 'the tunnel broke'}."
        return [Notice(level=NoticeLevel.WARNING, code="split_worker_lost", text=text, about=model)]

    def stop(self) -> list[AnyEffect]:
        """The node is stopping: it lends no more. Its launches are stopped by whoever stops them all."""
        self._splits.rest()
        self._ordered = None
        return self._lend(())

    def look(self, members: Sequence[Member], now: float) -> list[AnyEffect]:
        """Decide anew, and do what follows."""
        before = self._splits.word
        self._splits.look(self._situation(members), now)
        self.changed = before != self._splits.word
        effects = self._lend(members)
        effects += self._launch(members, now)
        return effects + self._tell_odd(members) + self._tell()

    def _situation(self, members: Sequence[Member]) -> SplitSituation:
        models, current = self._models, self._splits.model
        # What the user brings must find its memory free when it has come.
        brings = self._config.brings and models.launches.idle
        failed = {launch.model for launch in models.launches if launch.status is ModelStatus.FAILED}
        seed = models.group_model if models.group_model not in failed else None
        options = models.options_for(seed) if seed is not None else self._config.options
        solo = {
            serving.model
            for member in members
            for serving in member.announcement.serving
            if member.hosts(serving.model) and not _leads(member, serving.model)
        }
        return SplitSituation(
            members=members,
            on_disk=models.on_disk,
            elsewhere=elsewhere(members, models.on_disk) if self._config.can_fetch and not brings else {},
            alone=self._holds_alone,
            busy=not models.launches.idle,
            seed=seed,
            options=options,
            draft=lambda model: models.named_draft(options) or models.found_draft(model, options),
            offered=models.offered_bytes,
            rpc_version=models.capacity.rpc_version,
            excluded=models.excluded | {launch.model for launch in models.launches if launch.model != current},
            solo=solo,
        )

    def _holds_alone(self, facts: ModelFacts) -> bool:
        models = self._models
        if not models.launches.idle or facts.name in self.unobtainable:
            return False
        return not isinstance(plan_solo(facts, models.capacity.memory_bytes, LaunchOptions()), DoesNotFit)

    def _lend(self, members: Sequence[Member]) -> list[AnyEffect]:
        lending = self._splits.lending
        if lending == self._lending:
            return []
        before, self._lending = self._lending, lending
        self._models.lent_bytes = lending.memory_bytes if lending is not None else 0
        if lending is None:
            about = before.model if before is not None else ModelName("")
            text = f"{about} is no longer computed here for another node."
            notice = Notice(level=NoticeLevel.INFO, code="split_ended", text=text, about=about)
            return [Lend(lending=None), notice]
        facts = self._models.on_disk.get(lending.model) or elsewhere(members, ()).get(lending.model)
        share = lending.layout.share(self._config.node)
        layers = share.layers if share is not None else 0
        text = (
            f"Computing {layers} layers of {lending.model} for {_name(lending.host, members)}, "
            f"with {lending.memory_bytes / _UNIT:.1f} GB."
        )
        if lending.model not in self._models.on_disk:
            text += f" Its file is not here, so {_name(lending.host, members)} sends the weights of these layers."
        return [
            Lend(lending=lending, facts=facts),
            Notice(level=NoticeLevel.INFO, code="split_lending", text=text, about=lending.model),
        ]

    def _launch(self, members: Sequence[Member], now: float) -> list[AnyEffect]:
        order = self._splits.order
        model = self._splits.model
        facts = self._models.on_disk.get(model) if model is not None else None
        if order is None or facts is None:
            return self._give_up(now)
        plan, options = order
        if plan == self._ordered:
            return []
        effects = self._give_up(now) if self._ordered is not None and self._ordered.model != plan.model else []
        self._ordered = plan
        origin = Origin.USER if self._models.group_model == plan.model else Origin.MESH
        if plan.split is not None:
            parts = ", ".join(f"{_name(share.node, members)} {share.layers}" for share in plan.split.workers)
            text = f"{plan.model} is split: {plan.split.host.layers} layers here, {parts}."
            effects.append(Notice(level=NoticeLevel.INFO, code="split_formed", text=text, about=plan.model))
        return effects + self._models.launches.load(
            LaunchOrder(facts=facts, plan=plan, options=options, origin=origin), now
        )

    def _give_up(self, now: float) -> list[AnyEffect]:
        ordered, self._ordered = self._ordered, None
        if ordered is None:
            return []
        launch = self._models.launches.get(ordered.model)
        if launch is None or launch.status is ModelStatus.FAILED:
            return []
        if launch.status is ModelStatus.STOPPING and launch.next_order is None:
            return []
        why = self._splits.waiting or "another node hosts it now"
        return self._models.launches.drop(ordered.model, 0.0, now, why)

    def _tell_odd(self, members: Sequence[Member]) -> list[AnyEffect]:
        """Members of the group whose engines this node's cannot pair with, each told once, with both versions."""
        before, self._odd = self._odd, dict(self._splits.odd)
        model, mine = self._splits.model or ModelName(""), self._models.capacity.rpc_version
        effects: list[AnyEffect] = []
        for node, version in sorted(self._odd.items()):
            if before.get(node) != version:
                text = (
                    f"{_name(node, members)} and this node cannot share {model}: its engine speaks RPC "
                    f"{version or 'none'}, and this one's {mine or 'none'}. Install the same engine version on both."
                )
                effects.append(Notice(level=NoticeLevel.WARNING, code="split_version_mismatch", text=text, about=model))
        return effects

    def _tell(self) -> list[AnyEffect]:
        reason = next(iter(self.waiting.values()), "")
        if reason == self._said:
            return []
        self._said = reason
        if not reason:
            return []
        model = self._splits.model or ModelName("")
        text = f"{model}: {reason}. Machines that join by an invite of scope split can add theirs."
        return [Notice(level=NoticeLevel.INFO, code="model_waiting", text=text, about=model)]


def _leads(member: Member, model: ModelName) -> bool:
    word = member.announcement.split
    return word is not None and word.model == model


def _name(node: NodeId, members: Sequence[Member]) -> str:
    names = (member.announcement.name for member in members if member.announcement.node == node)
    return next(names, "") or node[:10]
