"""This node's part in a split model: which group it is in, whether it hosts, to whom it lends, what it waits for.

The host of a group alone decides the layout and announces it; all nodes agree on the host (`election`). `evaluate` may
be called at any time. What it leaves behind describes a whole state, so a repeated call changes nothing.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.membership.names import names_of, own_label
from mesh_llm.core.performance.prediction import Link, Links
from mesh_llm.core.placement.fit import DoesNotFit
from mesh_llm.core.split.election import Elected, MemberTracker, TooSmall, current_host, elect, mismatched
from mesh_llm.core.split.eligibility import Barred, GroupMember, Obstacle
from mesh_llm.core.split.inputs import AnnouncedGroup, SplitInputs, announced_groups
from mesh_llm.core.split.layout import (
    LeftOut,
    MemoryOffer,
    SplitRequest,
    group_fits,
    left_out,
    one_layer,
    plan_split,
)
from mesh_llm.core.split.outlook import Candidate, Outlook, candidate_of, outlook, survey, would_be
from mesh_llm.core.types.announcement import SplitOffer, SplitPreferences, SplitState
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import (
    AUTO_CACHE,
    CACHE_TYPES,
    LaunchOptions,
    LaunchPlan,
    Lending,
    ModelFacts,
    SplitLayout,
    SplitShare,
)

_ASSUMED_MS = 1.0
"""The round trip between two nodes of which nothing is known."""
_SOME_VERSION = "?"
"""Of engines that are all still being prepared: they are hoped to be able to pair."""
UNREACHED_SECONDS = 5.0
"""How long a node may be without a measured way to it until that is reported."""


class Counted(NamedTuple):
    """Whom a prospect counts otherwise than their announcements say.

    Attributes:
        hoped: nodes of which something is not known yet, or changes in a moment: they are counted as if it were good.
        absent: nodes that should have entered the group long ago, and have not: they are not counted on.
    """

    hoped: Collection[NodeId] = ()
    absent: Collection[NodeId] = ()


class Leadership(NamedTuple):
    """What this node does as the host: the launch, and the layout that it announces."""

    plan: LaunchPlan
    options: LaunchOptions
    layout: SplitLayout


class SplitGroup:
    """The group that this node takes part in.

    Attributes (read only):
        model: the group's model; None: this node is in no group.
        state: what to announce; None: nothing.
        leadership: what this node runs as the host; None: it is not the host.
        lending: what this node computes for the host; None: nothing.
        outlook: why the group is too small; None: it is not, or that is not known.
        waiting_reason: why the group does not run; else empty.
        stuck: no group can be formed as things are.
        mismatched: members whose engines cannot pair with this node's, with their RPC versions.
        asked_outlook: of a group that runs and in which all are asked to help: as the host, who does not, and why.
        left_out: of a group in which all are asked to help (`--split`), those without a layer: as the host, all of
            them; as a worker, this node.

    At most one of `leadership` and `lending` is set.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._tracker = MemberTracker(config.timings.split_grace)
        self._term = 0
        self._met = not config.joins
        self._candidate: object = None
        self._candidate_since = 0.0
        self._deadline: float | None = None
        self.model: ModelName | None = None
        self.state: SplitState | None = None
        self.leadership: Leadership | None = None
        self.lending: Lending | None = None
        self.outlook: Outlook | None = None
        self.asked_outlook: Outlook | None = None
        self._unreached: dict[NodeId, float] = {}
        self.waiting_reason = ""
        self.stuck = False
        self.mismatched: dict[NodeId, str] = {}
        self.left_out: tuple[LeftOut, ...] = ()

    @property
    def layout(self) -> SplitLayout | None:
        """The layout in force, as its host announced it: this node, or the node that it lends to."""
        if self.leadership is not None:
            return self.leadership.layout
        return self.lending.layout if self.lending is not None else None

    def deadline(self) -> float | None:
        """When to evaluate again if nothing happens before."""
        return self._deadline

    def failed(self, node: NodeId, now: float) -> None:
        """The tunnel to a worker failed."""
        self._tracker.failed(node, now)

    def leave(self) -> None:
        """Leave the group: lead and lend no more."""
        self._reset()
        self.model = None
        self._deadline = None

    def evaluate(self, inputs: SplitInputs, now: float) -> None:
        """Decide anew: choose the group, find its members, elect the host, then lead, follow or wait."""
        self._deadline = None
        self._met = self._met or bool(inputs.members)
        if self.model is not None:
            self._tracker.observe(self.model, inputs.members, now)
        model = self._choose(inputs)
        if model != self.model:
            self._reset()
            self.model = model
            self._tracker.observe(model, inputs.members, now)
        facts = inputs.facts(model) if model is not None else None
        if facts is None:
            self._reset()
            self.model = None
            return
        layout = self.layout
        working = frozenset(share.node for share in layout.shares) if layout is not None else frozenset[NodeId]()
        members = self._members(inputs, facts, working, now)
        self.mismatched = {one.node: one.rpc_version for one in mismatched(members, self._config.node)}
        self._term = max(self._term, *(one.state.term for one in members))
        self.outlook = self.asked_outlook = None
        self.stuck = False
        request = _request(facts, inputs, members)
        barred = inputs.barred(facts)
        if inputs.offer is None or not self._met:
            self._wait("the others are not found yet", stuck=True)
        elif barred is not None:
            self._wait_for(survey(request, self._candidates(inputs, facts, members, barred)))
        elif facts.name in inputs.solo and not _asked(members) and current_host(members) is None:
            # Some node serves it whole: there is nothing to split.
            self._wait("")
        else:
            candidates = self._candidates(inputs, facts, members, None)
            self._elect(request, members, candidates, inputs.doubted(facts.name), now)
        self.state = self._own_state(inputs, facts, working, now) if barred is None else None
        self.wake(self._tracker.deadline())

    def seen_from_outside(self, inputs: SplitInputs, facts: ModelFacts) -> Outlook | None:
        """Why another group does not run, which this node is not in; None: it can run, or will."""
        barred = inputs.barred(facts)
        if barred is None and self.model is not None:
            barred = Barred(Obstacle.ELSEWHERE, self.model)
        own = self._me(inputs, facts, None, barred or Barred(Obstacle.PENDING))
        candidates = [own, *(candidate_of(one, facts, silent=one.suspect) for one in inputs.members)]
        members = [one.member for one in candidates if one.member is not None]
        return survey(_request(facts, inputs, members), candidates)

    def prospect(self, inputs: SplitInputs, facts: ModelFacts, counted: Counted) -> Outlook | None:
        """What would keep a model from running if it were wanted; None: nothing that is known.

        Nodes in whose way nothing is would join. This node hosts only with workers to which a way was measured; what
        is not known of the ways between others is assumed to be good.
        """
        me = self._config.node
        version = inputs.rpc_version or next(
            (one.announcement.capacity.rpc_version for one in inputs.members if one.announcement.capacity.rpc_version),
            _SOME_VERSION,
        )
        doubted = inputs.doubted(facts.name)
        trips = {one.announcement.node: one.rtt_ms for one in inputs.members if one.rtt_ms}
        trips |= {node: _ASSUMED_MS for node in counted.hoped if node not in trips}
        trips = {node: milliseconds for node, milliseconds in trips.items() if node not in doubted}
        bare = facts.name not in inputs.on_disk
        able, wish = inputs, self._wish(inputs.options)
        if me in counted.hoped:
            offer = msgspec.structs.replace(inputs.offer or SplitOffer(fetches=True), obstacle="")
            able = dataclasses.replace(inputs, offer=offer, rpc_version=version)
        barred = able.barred(facts)
        state = SplitState(
            model=facts.name,
            fingerprint=facts.fingerprint,
            memory_bytes=inputs.offered(facts.name),
            max_rtt_ms=self._config.split.max_rtt_ms,
            round_trips=trips,
            seeds=True,
            wish=msgspec.structs.replace(wish, shares=()) if bare else wish,
            bare=bare,
        )
        candidates = [self._me(able, facts, state, barred)]
        ways = {one.announcement.node: _ASSUMED_MS for one in inputs.members}
        for one in inputs.members:
            node = one.announcement.node
            known = candidate_of(one, facts, silent=one.suspect)
            if known.member is None and node not in counted.absent:
                to_others = ways | ({me: trips[node]} if node in trips else {})
                hoped = version if node in counted.hoped else None
                known = would_be(one, known, facts, round_trips=to_others, hoped=hoped)
            candidates.append(known)
        members = [one.member for one in candidates if one.member is not None]
        return survey(_request(facts, inputs, members), candidates)

    def _me(self, inputs: SplitInputs, facts: ModelFacts, state: SplitState | None, barred: Barred | None) -> Candidate:
        """This node with a part in a group, or without."""
        name = own_label(self._config.node, self._config.name, names_of(inputs.members))
        member = None
        if state is not None and barred is None:
            member = GroupMember(
                node=self._config.node,
                state=state,
                rpc_version=inputs.rpc_version,
                name=name,
                gives=self._config.shares,
            )
        return Candidate(
            node=self._config.node,
            name=name,
            since=self._config.incarnation,
            memory_bytes=inputs.offered(facts.name),
            member=member,
            barred=barred,
            wants=inputs.wanted == facts.name,
        )

    # Which group.

    def _choose(self, inputs: SplitInputs) -> ModelName | None:
        """The model that this node's user wants; else the present one while it is wanted; else one it can help with."""
        if inputs.wanted is not None:
            return inputs.wanted
        known = self._helpable(inputs)
        current = self.model
        stays = current in inputs.on_disk and current not in inputs.excluded
        if current in known or (stays and self._tracker.wanted):
            return current
        ranked = sorted(known.values(), key=lambda group: (group.running and not group.asked, group.model))
        for group in ranked:
            facts = inputs.facts(group.model)
            if facts is not None and inputs.barred(facts) is None:
                return group.model
        return None

    def _helpable(self, inputs: SplitInputs) -> dict[ModelName, AnnouncedGroup]:
        """Groups that this node can help: it has the file, or is needed without it."""
        found = announced_groups(inputs.members, inputs.elsewhere, inputs.excluded)
        without_file = {
            model: group for model, group in found.items() if self._needed(group, inputs.elsewhere[model], inputs)
        }
        return without_file | announced_groups(inputs.members, inputs.on_disk, inputs.excluded)

    def _needed(self, group: AnnouncedGroup, facts: ModelFacts, inputs: SplitInputs) -> bool:
        """Whether a node without the file should help: the group counts on it, has no host yet, or asks all nodes.

        A node that may hold the model alone fetches it whole instead, which is faster than any group. A node that runs
        another model helps a group that asks all nodes only while those with the file are too few: fewer than two, or
        without enough memory.
        """
        if group.asked and inputs.busy:
            few = len(group.memories) < 2
            return few or not group_fits(SplitRequest(facts=facts), group.memories)
        if group.asked or self._config.node in group.computing:
            return True
        return not (group.running or inputs.alone(facts))

    def _reset(self) -> None:
        self.leadership = None
        self.lending = None
        self.state = None
        self.outlook = self.asked_outlook = None
        self._unreached = {}
        self.waiting_reason = ""
        self.stuck = False
        self.mismatched = {}
        self.left_out = ()
        self._candidate = None

    # Who hosts, and how.

    def _members(
        self, inputs: SplitInputs, facts: ModelFacts, working: Collection[NodeId], now: float
    ) -> list[GroupMember]:
        """This node and the other members that count."""
        me = GroupMember(
            node=self._config.node,
            state=self._own_state(inputs, facts, working, now),
            rpc_version=inputs.rpc_version,
            name=own_label(self._config.node, self._config.name, names_of(inputs.members)),
            gives=self._config.shares,
            on_processor=inputs.on_processor,
            speed=inputs.speed,
        )
        return [me, *self._tracker.members(facts.fingerprint, inputs.members, working, now)]

    def _candidates(
        self, inputs: SplitInputs, facts: ModelFacts, members: Sequence[GroupMember], barred: Barred | None
    ) -> list[Candidate]:
        """This node and all others, with what they do for the model. `members`: those that count, this node first."""
        me, counted = members[0], {one.node for one in members}
        own = self._me(inputs, facts, me.state, barred)
        others = (candidate_of(one, facts, silent=one.announcement.node not in counted) for one in inputs.members)
        return [own, *others]

    def _elect(
        self,
        request: SplitRequest,
        members: Sequence[GroupMember],
        candidates: Sequence[Candidate],
        doubted: Collection[NodeId],
        now: float,
    ) -> None:
        # The draft is the host's own. All nodes must find the same group.
        plain = msgspec.structs.replace(request, draft=None)
        outcome = elect(members, lambda memories: group_fits(plain, memories))
        if doubted:
            # The others know only that this node does not reach them.
            known = outcome.left_out
            found = [node for node in doubted if node in known and known[node].code == Obstacle.UNREACHED]
            named = known | {node: Barred(Obstacle.DISTRUSTED) for node in found}
            outcome = msgspec.structs.replace(outcome, left_out=named)
        if isinstance(outcome, TooSmall):
            self._wait_for(outlook(request, candidates, outcome))
        elif outcome.host == self._config.node:
            self.lending = None
            if request.asked:
                self.asked_outlook = outlook(request, candidates, self._without_found_soon(outcome, now))
            self._lead(request, outcome, members, now)
        else:
            self.leadership = None
            self._follow(request, outcome, members, doubted)

    def _without_found_soon(self, outcome: Elected, now: float) -> Elected:
        """An election's outcome in which a member that is not reached counts as pending for a few seconds.

        The way to a member is measured only after the member was heard to be in the group.
        """
        unreached = [node for node, barred in outcome.left_out.items() if barred.code == Obstacle.UNREACHED]
        self._unreached = {node: self._unreached.get(node, now) for node in unreached}
        known = dict(outcome.left_out)
        for node, since in self._unreached.items():
            if now < since + UNREACHED_SECONDS:
                known[node] = Barred(Obstacle.PENDING)
                self.wake(since + UNREACHED_SECONDS)
        return msgspec.structs.replace(outcome, left_out=known)

    def _lead(self, request: SplitRequest, outcome: Elected, members: Sequence[GroupMember], now: float) -> None:
        """Keep the present layout while it holds; else make a new one under a higher term.

        A broken layout is replaced at once. A first or a better one must stay the best for a moment, because more nodes
        may be coming.
        """
        present = self.leadership
        memory = {one.node: one.state.memory_bytes for one in members}
        holds = present is not None and _holds(present.layout, outcome.group, memory)
        if present is not None and holds:
            spare = set(outcome.group) - {share.node for share in present.layout.shares}
            if not (request.asked and spare):
                self._candidate = None
                self.waiting_reason = ""
                self.left_out = ()
                return
        if present is None or holds:
            settled = self._since((outcome.group, holds), now) + self._config.timings.split_settle
            if now < settled:
                self.wake(settled)
                self.waiting_reason = "" if holds else "waiting a moment for more nodes"
                return
        known = {one.node: one for one in members}
        offers = [
            MemoryOffer(
                node=node, memory_bytes=memory[node], on_processor=known[node].on_processor, speed=known[node].speed
            )
            for node in outcome.group
        ]
        version = next(one.rpc_version for one in members if one.node == outcome.host)
        term = max(outcome.term, self._term) + 1
        request = msgspec.structs.replace(request, groups=self._config.split.groups, links=_links(members))
        plan, options = _plan(request, offers, term, version)
        if isinstance(plan, DoesNotFit):
            self._wait(plan.message, stuck=True)
            return
        self.waiting_reason = ""
        self.left_out = left_out(request, offers, plan)
        if present is not None and holds:
            # Speeds and delays are measured again and again: other engines alone are no reason to load a model anew.
            groups, again = present.layout.groups, plan
            if plan.split is not None and plan.split.groups != groups:
                again, _ = _plan(msgspec.structs.replace(request, groups=groups), offers, term, version)
            if isinstance(again, LaunchPlan) and _same_shares(present.plan, again):
                return
        self._term = term
        alone = SplitShare(node=outcome.host, layers=request.facts.layers, memory_bytes=plan.memory_bytes)
        layout = plan.split or SplitLayout(term=term, shares=(alone,), rpc_version=version)
        self.leadership = Leadership(plan, options, layout)

    def _since(self, candidate: object, now: float) -> float:
        """Since when `candidate` has been the best layout."""
        if candidate != self._candidate:
            self._candidate, self._candidate_since = candidate, now
        return self._candidate_since

    def _follow(
        self, request: SplitRequest, outcome: Elected, members: Sequence[GroupMember], doubted: Collection[NodeId]
    ) -> None:
        """Lend to the host, once it leads a layout that this node is in.

        A host that this node distrusts gets nothing. It is elected all the same: by what all nodes know.
        """
        host = current_host([one for one in members if one.node == outcome.host])
        layout = host.state.layout(host.rpc_version) if host is not None else None
        share = layout.share(self._config.node) if layout is not None else None
        self.waiting_reason = "" if host is not None else "waiting for its host to begin"
        self.lending = None
        self.left_out = ()
        if outcome.host in doubted:
            name = host.label if host is not None else outcome.host[:10]
            self.waiting_reason = f"{name} hosts it, which is not trusted with this model: see mesh-llm trust list"
            return
        if host is not None and share is None and request.asked:
            me = next(one for one in members if one.node == self._config.node)
            if me.state.memory_bytes < (needed := one_layer(request)):
                self.left_out = (LeftOut(node=me.node, have_bytes=me.state.memory_bytes, need_bytes=needed),)
        if host is not None and layout is not None and share is not None and self.model is not None:
            self.lending = Lending(model=self.model, host=host.node, layout=layout, memory_bytes=share.memory_bytes)

    def _wait(self, reason: str, *, stuck: bool = False) -> None:
        self.stuck = stuck
        self.leadership = None
        self.lending = None
        self.waiting_reason = reason
        self.left_out = ()

    def _wait_for(self, found: Outlook | None) -> None:
        """Wait for what an outlook says. None: the others need nothing of this node."""
        reason = found.sentence() if found is not None else "other nodes run it together"
        self._wait(reason, stuck=found is not None)
        self.outlook = found

    # What it announces.

    def _own_state(self, inputs: SplitInputs, facts: ModelFacts, working: Collection[NodeId], now: float) -> SplitState:
        split, layout = self._config.split, self.leadership.layout if self.leadership is not None else None
        wants = inputs.wanted == facts.name
        return SplitState(
            model=facts.name,
            fingerprint=facts.fingerprint,
            memory_bytes=inputs.offered(facts.name),
            seeds=wants or self._tracker.adopted,
            asked=wants and split.asked,
            max_rtt_ms=split.max_rtt_ms,
            round_trips=self._tracker.round_trips(
                inputs.members, split.max_rtt_ms, working, now, inputs.doubted(facts.name)
            ),
            term=layout.term if layout is not None else self._term,
            leads=layout is not None,
            shares=layout.shares if layout is not None else (),
            wish=self._wish(inputs.options) if wants else SplitPreferences(),
            bare=facts.name not in inputs.on_disk,
        )

    def _wish(self, options: LaunchOptions) -> SplitPreferences:
        """What the user of this node fixed by hand."""
        return SplitPreferences(
            context=options.context or 0,
            slots=options.slots or 0,
            shares=self._config.split.shares,
            cache_type="" if options.cache_type in {AUTO_CACHE, "f16"} else options.cache_type,
        )

    def wake(self, time: float | None) -> None:
        """Evaluate again at `time`, or earlier."""
        if time is not None:
            self._deadline = time if self._deadline is None else min(self._deadline, time)


def _request(facts: ModelFacts, inputs: SplitInputs, members: Sequence[GroupMember]) -> SplitRequest:
    """What the whole group wants. For each option the first member by id counts whose user fixed it."""
    wishes = [one.state.wish for one in sorted(members, key=lambda one: one.node)]
    context = next((wish.context for wish in wishes if wish.context), None)
    slots = next((wish.slots for wish in wishes if wish.slots), None)
    # Peers choose the text.
    cache_types = (wish.cache_type for wish in wishes if wish.cache_type in CACHE_TYPES)
    return SplitRequest(
        facts=facts,
        options=msgspec.structs.replace(
            inputs.options, context=context, slots=slots, cache_type=next(filter(None, cache_types), "f16")
        ),
        shares=next((wish.shares for wish in wishes if wish.shares), ()),
        asked=_asked(members),
        draft=inputs.draft(facts.name),
    )


def _asked(members: Sequence[GroupMember]) -> bool:
    return any(one.state.asked for one in members)


def _plan(
    request: SplitRequest, offers: Sequence[MemoryOffer], term: int, version: str
) -> tuple[LaunchPlan | DoesNotFit, LaunchOptions]:
    """The launch with the draft if it fits, else without."""
    plan, options = plan_split(request, offers, term, version), request.options
    if isinstance(plan, DoesNotFit) and request.draft is not None:
        plain = msgspec.structs.replace(request, draft=None)
        return plan_split(plain, offers, term, version), msgspec.structs.replace(options, draft=None, use_draft=False)
    found = request.draft is not None and options.draft is None and options.use_draft
    if found and request.draft is not None and isinstance(plan, LaunchPlan):
        plan = msgspec.structs.replace(plan, draft=request.draft.name)
    return plan, options


def _links(members: Sequence[GroupMember]) -> Links:
    """The delays between members, as they announce them."""
    return {
        (one.node, other): Link(one_way_seconds=milliseconds / 2e3)
        for one in members
        for other, milliseconds in one.state.round_trips.items()
    }


def _holds(layout: SplitLayout, group: Sequence[NodeId], memory: Mapping[NodeId, int]) -> bool:
    """Whether all nodes of a layout are still in the group, with at least the memory that they gave."""
    return all(share.node in group and memory[share.node] >= share.memory_bytes for share in layout.shares)


def _same_shares(present: LaunchPlan, new: LaunchPlan) -> bool:
    """Whether a new plan changes nothing but the term."""
    if present.split is None or new.split is None:
        return present.split is new.split
    return present.split.shares == new.split.shares
