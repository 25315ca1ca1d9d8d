"""Carries this node's part in a split model into effects: the launch of a host, the lending of a worker, notices.

One evaluation, from here down: `SplitController.evaluate` collects the inputs; `SplitGroup.evaluate` chooses the group,
lets `election.elect` name the host, and leads (`layout.plan_split`), follows or waits; then the controller starts or
stops what runs here. See `election` for the invariants.
"""

import dataclasses
from collections.abc import Collection, Container, Hashable, Iterator, Sequence

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.fit import CONTEXT_STEP, DoesNotFit, plan_solo
from mesh_llm.core.placement.launches import LaunchOrder, Origin
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.split.alternative import faster_alone
from mesh_llm.core.split.eligibility import Barred, Obstacle, to_join
from mesh_llm.core.split.group import UNREACHED_SECONDS, Counted, SplitGroup
from mesh_llm.core.split.inputs import SplitInputs, announced_groups, models_elsewhere
from mesh_llm.core.split.layout import MemoryOffer
from mesh_llm.core.split.outlook import Outlook, clause
from mesh_llm.core.types.announcement import MAX_DECLINED, Member, SplitOffer
from mesh_llm.core.types.effects import AnyEffect, Lend, Notice, NoticeLevel
from mesh_llm.core.types.events import SplitScope
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, Lending, ModelFacts, ModelStatus, SplitLayout

_GIGABYTE = 10**9
_ALL_AS_KNOWN = Counted()
_SMALLEST = LaunchOptions(context=CONTEXT_STEP, slots=1, use_draft=False)


class SplitController:
    """Keeps what runs here equal to what the group decides. Methods that return effects change launches and lending."""

    def __init__(self, config: NodeConfig, models: LocalModels) -> None:
        self._config = config
        self._models = models
        self._launched: LaunchPlan | None = None
        self._alone_is_better = False
        self._solo = False
        """Whether `_launched` ran here before there was a group for it. It goes on until the group needs this node."""
        self._waiting_reported: dict[ModelName, Hashable] = {}
        self._unreached_since: dict[ModelName, float] = {}
        self._mismatches_reported: dict[NodeId, str] = {}
        self._left_out_reported: dict[NodeId, str] = {}
        self.group = SplitGroup(config)
        self.scope = SplitScope(granted=not config.joins)
        """What this node's own admission permits."""
        self.admitted = not config.joins
        """Whether that is known."""
        self.outlooks: tuple[Outlook, ...] = ()
        """Models that wait for more memory: this group's, and those that this node could help."""
        self.lending: Lending | None = None
        """What this node computes for another host."""
        self._offered: SplitOffer | None = None
        self.changed = False
        """Whether the last evaluation changed the announced state."""
        self.distrusted: frozenset[tuple[ModelName, NodeId]] = frozenset()
        """Models on nodes that this node does not trust with them: it neither takes them for workers nor helps them."""
        self.unobtainable: Container[ModelName] = set()
        """Models whose files could not be fetched."""

    @property
    def waiting(self) -> dict[ModelName, str]:
        """The model that a user of this node wants and that cannot be served yet, with the reason."""
        model, reason = self.group.model, self.group.waiting_reason
        if model is None or model != self._models.group_model or not reason:
            return {}
        return {model: reason}

    @property
    def busy(self) -> bool:
        """Whether this node takes part in a split model that runs."""
        return self.lending is not None or self._launched is not None

    def offer(self, yielding: str = "") -> SplitOffer | None:
        """What this node offers to split models; None: its admission is not known. `yielding`: why it yields, if so."""
        models, rpc = self._models, self._models.rpc
        if not self.admitted:
            return None
        if yielding:
            obstacle, detail = Obstacle.YIELDING, yielding
        elif not self.scope.granted:
            obstacle, detail = Obstacle.SCOPE, self.scope.scope
        elif not models.capacity.rpc_version:
            obstacle, detail = rpc.obstacle or Obstacle.PLUGIN, rpc.detail
        else:
            obstacle, detail = "", ""
        return SplitOffer(
            obstacle=obstacle,
            detail=detail,
            memory_bytes=max(0, models.capacity.memory_bytes - models.launches.reserved_bytes()),
            fetches=self._config.can_fetch and not self._brings,
            brings=self._brings,
            declined=tuple(sorted(models.excluded))[:MAX_DECLINED],
        )

    @property
    def why_not_shareable(self) -> str:
        """What is in the way, as a clause whose subject is this node."""
        rpc = self._models.rpc
        return clause(Barred(rpc.obstacle or Obstacle.PLUGIN, rpc.detail))

    @property
    def wanted_group(self) -> ModelName | None:
        """The model that a user of this node wants and that needs a group."""
        return self._models.group_model

    @property
    def _brings(self) -> bool:
        """The model that the user brings must find its memory free once it is fetched."""
        return self._config.brings and self._models.launches.idle

    @property
    def forming(self) -> bool:
        """Whether the group of a model that this node's user wants has what it needs, and is about to run."""
        model = self._models.group_model
        return model is not None and self.group.model == model and self.group.outlook is None

    @property
    def helps(self) -> bool:
        """Whether this node is in a group, running or not."""
        return self.group.model is not None

    def layout(self, members: Sequence[Member]) -> tuple[ModelName, SplitLayout] | None:
        """A split model that runs: this node's own, else the first by name that others announce."""
        own = self.group.layout
        if own is not None and self.group.model is not None:
            return (self.group.model, own) if own.workers else None
        states = [member.announcement.split for member in members if not member.suspect]
        found = [(state.model, layout) for state in states if state is not None and (layout := state.layout())]
        return min(
            (entry for entry in found if entry[1].workers), key=lambda entry: (entry[0], -entry[1].term), default=None
        )

    def asked(self, members: Sequence[Member]) -> frozenset[ModelName]:
        """Models that a user wants split (`--split`), and this group's model. No node takes them up whole meanwhile."""
        states = [member.announcement.split for member in members]
        asked = {state.model for state in states if state is not None and state.asked}
        return frozenset(asked if self.group.model is None else {*asked, self.group.model})

    def failed(
        self, node: NodeId, model: ModelName, reason: str, members: Sequence[Member], now: float
    ) -> list[AnyEffect]:
        """The tunnel to a worker failed."""
        if self._launched is None or self._launched.model != model:
            return []
        self.group.failed(node, now)
        text = f"{_label(node, members)} was lost for {model}: {reason.rstrip('.') or 'the tunnel broke'}."
        return [Notice(level=NoticeLevel.WARNING, code="split_worker_lost", text=text, about=model)]

    def stop(self) -> list[AnyEffect]:
        """Leave the group and lend no more. The caller stops the launches."""
        self.group.leave()
        self._launched = None
        return self._lend(())

    def evaluate(self, members: Sequence[Member], now: float) -> list[AnyEffect]:
        """Let the group decide, and do what follows."""
        before = self.group.state
        offered = self._offered
        self._adopt_solo(members)
        self._alone_is_better = self._prefers_alone(members)
        self._adopt_offloaded()
        inputs = self._inputs(members)
        self.group.evaluate(inputs, now)
        self.outlooks = tuple(self._outlooks(inputs))
        self._offered = inputs.offer
        self.changed = before != self.group.state or offered != inputs.offer
        return [
            *self._launch(members, now),
            *self._serve_alone(now),
            *self._lend(members),
            *self._report_mismatches(members),
            *self._report_left_out(members),
            *self._report_waiting(now),
        ]

    def _inputs(self, members: Sequence[Member]) -> SplitInputs:
        models = self._models
        own = {self.group.model, self._launched.model if self._launched is not None else None}
        failed = {launch.model for launch in models.launches if launch.status is ModelStatus.FAILED}
        wanted = models.group_model if models.group_model not in failed and not self._alone_is_better else None
        options = models.options_for(wanted) if wanted is not None else self._config.options
        states = ((one.announcement.node, one.announcement.split) for one in members if self.distrusted)
        avoided = {state.model for node, state in states if state and (state.model, node) in self.distrusted}
        return SplitInputs(
            members=members,
            on_disk=models.on_disk,
            elsewhere=models_elsewhere(members, models.on_disk) if self._config.can_fetch and not self._brings else {},
            alone=self._may_hold_alone,
            busy=not models.launches.idle,
            wanted=wanted,
            options=options,
            draft=lambda model: models.named_draft(options) or models.found_draft(model, options),
            offered=models.offered_bytes,
            rpc_version=models.capacity.rpc_version,
            on_processor=models.capacity.on_processor,
            speed=models.capacity.speed,
            excluded=models.excluded.union(
                avoided, (launch.model for launch in models.launches if launch.model not in own)
            ),
            solo={
                serving.model
                for member in members
                for serving in member.announcement.serving
                if member.hosts(serving.model) and not _in_group(member, serving.model)
            },
            offer=self.offer(),
            distrusted=self.distrusted,
        )

    def _outlooks(self, inputs: SplitInputs) -> Iterator[Outlook]:
        """Why groups do not run: this node's, and those that it stays out of. No word about what some node serves."""
        members = inputs.members
        if self.group.outlook is not None and not self._served(self.group.outlook.model, members):
            yield self.group.outlook
        if inputs.offer is None:
            return
        known = models_elsewhere(members, inputs.on_disk) | dict(inputs.on_disk)
        for model, group in sorted(announced_groups(members, known, ()).items()):
            if model != self.group.model and not group.running and not self._served(model, members):
                found = self.group.seen_from_outside(inputs, known[model])
                if found is not None:
                    yield found

    def prospect(
        self,
        facts: ModelFacts,
        members: Sequence[Member],
        *,
        counted: Counted = _ALL_AS_KNOWN,
        without: Collection[ModelName] = (),
    ) -> Outlook | None:
        """What would keep a model from being shared if this node, which has its file, wanted it; None: nothing.

        `counted`: who counts otherwise than the announcements say. `without`: models that are unloaded here first.
        """

        def offered(model: ModelName) -> int:
            return self._models.offered_bytes(model, without)

        known, options = self._inputs(members), self._models.options_for(facts.name)
        on_disk = {**known.on_disk, facts.name: facts}
        inputs = dataclasses.replace(known, on_disk=on_disk, wanted=facts.name, options=options, offered=offered)
        return self.group.prospect(inputs, facts, counted)

    def prospect_elsewhere(
        self, facts: ModelFacts, members: Sequence[Member], counted: Counted = _ALL_AS_KNOWN
    ) -> Outlook | None:
        """The same if another node that has the file wanted it; this node could help.

        Which context that node's user fixed is not known here, so the smallest launch counts.
        """
        inputs = dataclasses.replace(self._inputs(members), wanted=None, options=_SMALLEST)
        return self.group.prospect(inputs, facts, counted)

    def _served(self, model: ModelName, members: Sequence[Member]) -> bool:
        """Whether a model is served somewhere, or will be at once: by a node alone, while no group can be formed."""
        launch = self._models.launches.get(model)
        here = launch is not None and launch.status in {ModelStatus.WARM, ModelStatus.LOADING}
        return here or any(member.hosts(model) for member in members)

    def barred(self, facts: ModelFacts, members: Sequence[Member]) -> Barred | None:
        """What would keep this node out of the group of a model; its file would be here."""
        inputs = self._inputs(members)
        return dataclasses.replace(inputs, on_disk={**inputs.on_disk, facts.name: facts}).barred(facts)

    def _may_hold_alone(self, facts: ModelFacts) -> bool:
        models = self._models
        if not models.launches.idle or facts.name in self.unobtainable:
            return False
        return not isinstance(plan_solo(facts, models.capacity.memory_bytes, LaunchOptions()), DoesNotFit)

    def _lend(self, members: Sequence[Member]) -> list[AnyEffect]:
        """Begin or end to compute layers for another host, as the group decided."""
        before, lending = self.lending, self.group.lending
        if lending is not None and self._still_runs(lending.model):
            # Its memory is needed first. The host waits for a moment.
            lending = None
        if lending == before:
            return []
        self.lending = lending
        self._models.lent_bytes = lending.memory_bytes if lending is not None else 0
        if lending is None:
            about = before.model if before is not None else ModelName("")
            text = f"{about} is no longer computed here for another node."
            notice = Notice(level=NoticeLevel.INFO, code="split_ended", text=text, about=about)
            return [Lend(lending=None), notice]
        facts = self._models.on_disk.get(lending.model) or models_elsewhere(members, ()).get(lending.model)
        share, host = lending.layout.share(self._config.node), _label(lending.host, members)
        layers = share.layers if share is not None else 0
        text = (
            f"Computing {layers} layers of {lending.model} for {host}, with {lending.memory_bytes / _GIGABYTE:.1f} GB."
        )
        if lending.model not in self._models.on_disk:
            text += f" Its file is not here, so {host} sends the weights of these layers."
        notice = Notice(level=NoticeLevel.INFO, code="split_lending", text=text, about=lending.model)
        return [Lend(lending=lending, facts=facts), notice]

    def _still_runs(self, model: ModelName) -> bool:
        launch = self._models.launches.get(model)
        return launch is not None and launch.running

    def _adopt_solo(self, members: Sequence[Member]) -> None:
        """A model that runs here alone belongs to the group as soon as another node's user wants it split (`--split`).

        A model of this node's user stays one: it is served here again when the group ends.
        """
        models, offer = self._models, self.offer()
        if self._launched is not None or self.lending is not None or models.group_model is not None or offer is None:
            return
        for member in members:
            state = member.announcement.split
            if member.suspect or state is None or not state.asked:
                continue
            facts, launch = models.on_disk.get(state.model), models.launches.get(state.model)
            if facts is None or facts.fingerprint != state.fingerprint or launch is None or not launch.running:
                continue
            if launch.status is ModelStatus.STOPPING:
                continue
            if to_join(offer, facts, facts.fingerprint, models.offered_bytes(facts.name)) is not None:
                continue
            self._launched, self._solo = launch.order.plan, True
            if launch.order.origin is Origin.USER:
                models.group_model, models.group_origin = launch.model, Origin.USER
            return

    def _launch(self, members: Sequence[Member], now: float) -> list[AnyEffect]:
        """Start, change or stop the engine of the model that this node hosts, as the group decided."""
        leadership = self.group.leadership
        facts = self._models.on_disk.get(self.group.model) if self.group.model is not None else None
        if self._solo and self._launched is not None and self.group.model != self._launched.model:
            # There is no group any more: it goes on alone.
            self._launched, self._solo = None, False
        if leadership is None or facts is None:
            goes_on = self._solo and self.group.lending is None
            return [] if goes_on else self._give_up(now)
        plan, options = leadership.plan, leadership.options
        if plan == self._launched:
            return []
        effects = self._give_up(now) if self._launched is not None and self._launched.model != plan.model else []
        self._launched, self._solo = plan, False
        if plan.split is not None:
            parts = ", ".join(f"{_label(share.node, members)} {share.layers}" for share in plan.split.workers)
            text = f"{plan.model} is split: {plan.split.host.layers} layers here, {parts}."
            effects.append(Notice(level=NoticeLevel.INFO, code="split_formed", text=text, about=plan.model))
        origin = self._models.group_origin if self._models.group_model == plan.model else Origin.MESH
        order = LaunchOrder(facts=facts, plan=plan, options=options, origin=origin)
        return effects + self._models.launches.load(order, now)

    def _prefers_alone(self, members: Sequence[Member]) -> bool:
        """Whether the user's model is better served by this GPU and its processor than by the nodes that could help.

        What runs split goes on so: each change costs a load.
        """
        models, model = self._models, self._models.group_model
        running = self._launched is not None and self._launched.split is not None
        if model is None or running or self.lending is not None or self._config.split.asked:
            return False
        order = models.check(model, None)
        if isinstance(order, LoadRefused) or order.plan.offload is None:
            return False
        me = MemoryOffer(node=self._config.node, memory_bytes=models.offered_bytes(model))
        return faster_alone(order, me, models.capacity, members)

    def _adopt_offloaded(self) -> None:
        """The user's model, served by GPU and processor, belongs to the group as soon as a group would be better."""
        model = self._models.group_model
        launch = self._models.launches.get(model) if model is not None else None
        if self._launched is not None or self._alone_is_better or launch is None or not launch.running:
            return
        if launch.order.plan.offload is not None and launch.status is not ModelStatus.STOPPING:
            self._launched, self._solo = launch.order.plan, True

    def _serve_alone(self, now: float) -> list[AnyEffect]:
        """Serve the user's model from main memory beside the GPU's while no group can be formed, or none is faster."""
        models, model = self._models, self._models.group_model
        if not (self.group.stuck or self._alone_is_better) or self._launched is not None:
            return []
        if model is None or models.launches.get(model) is not None:
            return []
        order = models.check(model, None)
        if isinstance(order, LoadRefused) or order.plan.offload is None:
            return []
        self._launched, self._solo = order.plan, True
        return models.launches.load(order, now)

    def _give_up(self, now: float) -> list[AnyEffect]:
        launched, self._launched, self._solo = self._launched, None, False
        if launched is None:
            return []
        launch = self._models.launches.get(launched.model)
        if launch is None or launch.status is ModelStatus.FAILED:
            return []
        if launch.status is ModelStatus.STOPPING and launch.next_order is None:
            return []
        why = self.group.waiting_reason or "another node hosts it now"
        return self._models.launches.drop(launched.model, 0.0, now, why)

    def _report_mismatches(self, members: Sequence[Member]) -> list[AnyEffect]:
        """Report each member whose engine cannot pair with this node's, once, with both versions."""
        before, self._mismatches_reported = self._mismatches_reported, dict(self.group.mismatched)
        model, mine = self.group.model or ModelName(""), self._models.capacity.rpc_version
        effects: list[AnyEffect] = []
        for node, version in sorted(self.group.mismatched.items()):
            if before.get(node) != version:
                text = (
                    f"{_label(node, members)} and this node cannot share {model}: its engine speaks RPC "
                    f"{version or 'none'}, and this one's {mine or 'none'}. Install the same engine version on both."
                )
                effects.append(Notice(level=NoticeLevel.WARNING, code="split_version_mismatch", text=text, about=model))
        return effects

    def left_out(self, members: Sequence[Member]) -> dict[NodeId, str]:
        """Nodes that `--split` asks to help and that get no layer, or may not help, each with a sentence."""
        model = self.group.model
        found: dict[NodeId, str] = {}
        for one in self.group.left_out:
            who = "This node" if one.node == self._config.node else _label(one.node, members)
            found[one.node] = f"{who} computes nothing of {model}: {one.reason}."
        view = self.group.asked_outlook
        if view is not None:
            me = self._config.node
            found |= {one.node: f"{model}: {view.about(one, me)}" for one in view.kept_out}
        return found

    def _report_left_out(self, members: Sequence[Member]) -> list[AnyEffect]:
        """Report each node that gets no layer, once for each reason."""
        before, self._left_out_reported = self._left_out_reported, self.left_out(members)
        about = self.group.model or ModelName("")
        return [
            Notice(level=NoticeLevel.WARNING, code="split_left_out", text=text, about=about)
            for node, text in self._left_out_reported.items()
            if before.get(node) != text
        ]

    def _report_waiting(self, now: float) -> list[AnyEffect]:
        """Report once for each reason why a model cannot be served that this node's user wants, or could help.

        Which reason it is counts, not the round trip in its text. That there is no way to a node is reported after a
        while, because at first none was measured.
        """
        me = self._config.node
        texts = dict(self.waiting) | {one.model: one.sentence(me) for one in self.outlooks}
        reasons: dict[ModelName, Hashable] = dict(texts) | {one.model: one.reason for one in self.outlooks}
        unreached = {one.model for one in self.outlooks if one.unreached}
        self._unreached_since = {model: self._unreached_since.get(model, now) for model in unreached}
        before, self._waiting_reported = self._waiting_reported, {}
        effects: list[AnyEffect] = []
        for model, text in texts.items():
            if self._models.launches.get(model) is not None:
                continue
            reported, reason = before.get(model), reasons[model]
            due = self._unreached_since.get(model, now - UNREACHED_SECONDS) + UNREACHED_SECONDS
            if now < due:
                self.group.wake(due)
                reason = reported
            elif reported != reason:
                effects.append(
                    Notice(level=NoticeLevel.INFO, code="model_waiting", text=f"{model}: {text}", about=model)
                )
            self._waiting_reported[model] = reason
        return effects


def _in_group(member: Member, model: ModelName) -> bool:
    state = member.announcement.split
    return state is not None and state.model == model


def _label(node: NodeId, members: Sequence[Member]) -> str:
    labels = (member.label for member in members if member.announcement.node == node)
    return next(labels, node[:10])
