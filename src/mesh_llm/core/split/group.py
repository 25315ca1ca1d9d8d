"""This node's part in a split model: which group it is in, whether it leads, whom it lends to, what it waits for.

`look` may be called at any time; what it returns is a wish about the whole state, so asking twice does nothing twice.
The host of a group decides its form alone and announces it; all decide alike who the host is (`election`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.fit import DoesNotFit
from mesh_llm.core.split.election import (
    Candidate,
    Elected,
    Short,
    SplitGroup,
    choose_group,
    elect,
    groups,
    mismatches,
    needs_bare,
    sitting_host,
)
from mesh_llm.core.split.layout import Lender, SplitAsk, fits, plan_split, shortfall
from mesh_llm.core.split.members import SplitMembers
from mesh_llm.core.types.announcement import Member, SplitPreferences, SplitState
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, Lending, ModelFacts, SplitLayout, SplitShare


@dataclass(frozen=True, kw_only=True)
class SplitSituation:
    """What a decision is made from.

    Attributes:
        members: all other nodes that are not dead.
        on_disk: models here.
        elsewhere: models of groups whose files only others have; empty where nothing is to be taken from others.
        alone: whether this node is free to hold a model by itself, and can still be thought to get its file.
        busy: this node runs a model of its own.
        seed: the model that a user of this node wants and that needs a group; None: there is none.
        options: what was fixed by hand for that one.
        draft: what this node would use to guess ahead for a model, where there is something.
        offered: bytes that this node has for a model, beside everything else.
        rpc_version: of this node's engine; empty where it cannot pair.
        excluded: models not to be touched here: dropped, failed, or served by this node alone.
        solo: models that somebody serves whole.
    """

    members: Sequence[Member]
    on_disk: Mapping[ModelName, ModelFacts]
    elsewhere: Mapping[ModelName, ModelFacts]
    alone: Callable[[ModelFacts], bool]
    busy: bool
    seed: ModelName | None
    options: LaunchOptions
    draft: Callable[[ModelName], ModelFacts | None]
    offered: Callable[[ModelName], int]
    rpc_version: str
    excluded: Collection[ModelName]
    solo: Collection[ModelName]

    def facts(self, model: ModelName) -> ModelFacts | None:
        """Of a model here, or of a group's that is not."""
        return self.on_disk.get(model) or self.elsewhere.get(model)


@dataclass(kw_only=True)
class _Seat:
    """The form of the group that this node leads."""

    plan: LaunchPlan
    layout: SplitLayout
    options: LaunchOptions


@dataclass
class _Stable:
    """What would be done, and since when that has been so."""

    key: object = None
    since: float = field(default=0.0)

    def held(self, key: object, now: float) -> float:
        """Since when this has been the wish."""
        if key != self.key:
            self.key, self.since = key, now
        return self.since


class Splits:
    """See the module's text."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._members = SplitMembers(config.timings.split_grace)
        self._stable = _Stable()
        self._seat: _Seat | None = None
        self._term = 0
        self._met = not config.joins
        self._deadline: float | None = None
        self.granted = not config.joins
        self.model: ModelName | None = None
        self.word: SplitState | None = None
        self.lending: Lending | None = None
        self.waiting = ""
        self.odd: dict[NodeId, str] = {}

    @property
    def order(self) -> tuple[LaunchPlan, LaunchOptions] | None:
        """What this node is to run as the host; None where it leads nothing."""
        return None if self._seat is None else (self._seat.plan, self._seat.options)

    @property
    def layout(self) -> SplitLayout | None:
        """The group's form, as its host announced it: of this node, or of the one that it lends to."""
        if self._seat is not None:
            return self._seat.layout
        return self.lending.layout if self.lending is not None else None

    def deadline(self) -> float | None:
        """When to look again, if nothing happens before."""
        return self._deadline

    def failed(self, node: NodeId, now: float) -> None:
        """The tunnel to a worker failed."""
        self._members.failed(node, now)

    def look(self, situation: SplitSituation, now: float) -> None:
        """Decide anew: `model`, `word`, `order`, `lending` and `waiting` say what holds from now on."""
        self._deadline = None
        self._met = self._met or bool(situation.members)
        if self.model is not None:
            self._members.observe(self.model, situation.members, now)
        model = self._choose(situation)
        if model != self.model:
            self._leave()
            self.model = model
            self._members.observe(model, situation.members, now)
        facts = situation.facts(model) if model is not None else None
        if model is None or facts is None:
            self._leave()
            self.model = None
            return
        working = self._working()
        me = Candidate(
            node=self._config.node,
            word=self._own_word(situation, facts, working, now),
            rpc_version=situation.rpc_version,
            name=self._config.name,
            gives=self._config.shares,
        )
        others = list(self._members.candidates(facts.fingerprint, situation.members, working, now))
        candidates = [me, *others]
        self.odd = {one.node: one.rpc_version for one in mismatches(candidates, me.node)}
        self._term = max(self._term, *(candidate.word.term for candidate in candidates))
        if not self.granted:
            self._wait_for("its invite does not let this node share models: join by one with the scope split")
        elif not self._met:
            self._wait_for("the others are not found yet")
        else:
            self._decide(situation, _ask(facts, situation, candidates), candidates, now)
        self.word = self._own_word(situation, facts, working, now) if self.granted else None
        self._wake(self._members.deadline(now))

    def rest(self) -> None:
        """The node is stopping: it leads and lends no more."""
        self._leave()
        self.model = None
        self._deadline = None

    # Which group.

    def _choose(self, situation: SplitSituation) -> ModelName | None:
        if not situation.rpc_version:
            return None
        if situation.seed is not None:
            return situation.seed
        known = self._known(situation)
        current = self.model
        stays = current in situation.on_disk and current not in situation.excluded
        if current in known or (stays and self._members.wanted):
            return current
        if not self.granted:
            return None
        chosen = choose_group(known.values())
        return chosen.model if chosen is not None and situation.offered(chosen.model) > 0 else None

    def _known(self, situation: SplitSituation) -> dict[ModelName, SplitGroup]:
        """Groups that this node could help: by its own copy of the file, or where it is needed without one."""
        me, busy = self._config.node, situation.busy
        needed = {
            model: group
            for model, group in groups(situation.members, situation.elsewhere, situation.excluded).items()
            if needs_bare(group, facts := situation.elsewhere[model], me, alone=situation.alone(facts), busy=busy)
        }
        return needed | groups(situation.members, situation.on_disk, situation.excluded)

    def _leave(self) -> None:
        self._seat = None
        self.lending = None
        self.word = None
        self.waiting = ""
        self.odd = {}
        self._stable = _Stable()

    # Who leads, and how.

    def _decide(self, situation: SplitSituation, ask: SplitAsk, candidates: Sequence[Candidate], now: float) -> None:
        me = self._config.node
        if ask.facts.name in situation.solo and not ask.asked and sitting_host(candidates) is None:
            self._wait_for("")
            return
        # A draft is the host's own, and the same group must be found by everybody.
        plain = msgspec.structs.replace(ask, draft=None)
        outcome = elect(candidates, lambda memories: fits(plain, memories))
        if isinstance(outcome, Short):
            self._fall_short(ask, outcome, candidates)
        elif outcome.host == me:
            self.lending = None
            self._lead(ask, outcome, candidates, now)
        else:
            self._seat = None
            self._follow(outcome, candidates)

    def _lead(self, ask: SplitAsk, outcome: Elected, candidates: Sequence[Candidate], now: float) -> None:
        seat = self._seat
        offers = {candidate.node: candidate.word.memory_bytes for candidate in candidates}
        holds = seat is not None and _holds(seat.layout, outcome.group, offers)
        if seat is not None and holds:
            spare = set(outcome.group) - {share.node for share in seat.layout.shares}
            if not (ask.asked and spare):
                self._stable = _Stable()
                self._sit(seat)
                return
        # A seat that broke is mended at once; what is new is first looked at for a moment: more may be coming.
        if seat is None or holds:
            settled = self._stable.held((outcome.group, holds), now) + self._config.timings.split_settle
            if now < settled:
                self._wake(settled)
                self.waiting = "" if holds else "waiting a moment for more nodes"
                return
        lenders = [Lender(node=node, memory_bytes=offers[node]) for node in outcome.group]
        version = next(candidate.rpc_version for candidate in candidates if candidate.node == outcome.host)
        term = max(outcome.term, self._term) + 1
        plan, options = plan_split(ask, lenders, term, version), ask.options
        if isinstance(plan, DoesNotFit) and ask.draft is not None:
            plain = msgspec.structs.replace(ask, draft=None)
            plan, options = plan_split(plain, lenders, term, version), _without_draft(options)
        if isinstance(plan, DoesNotFit):
            self._wait_for(plan.message)
            return
        if ask.draft is not None and options.draft is None and options.use_draft:
            plan = msgspec.structs.replace(plan, draft=ask.draft.name)
        if seat is not None and holds and _same_form(seat.plan, plan):
            self._sit(seat)
            return
        self._term = term
        alone = SplitShare(node=outcome.host, layers=ask.facts.layers, memory_bytes=plan.memory_bytes)
        layout = plan.split or SplitLayout(term=term, shares=(alone,), rpc_version=version)
        self._sit(_Seat(plan=plan, layout=layout, options=options))

    def _sit(self, seat: _Seat) -> None:
        self._seat = seat
        self.waiting = ""

    def _follow(self, outcome: Elected, candidates: Sequence[Candidate]) -> None:
        host = sitting_host([candidate for candidate in candidates if candidate.node == outcome.host])
        layout = host.word.layout(host.rpc_version) if host is not None else None
        share = layout.share(self._config.node) if layout is not None else None
        self.waiting = "" if host is not None else "waiting for its host to begin"
        if host is None or layout is None or share is None or self.model is None:
            self.lending = None
            return
        self.lending = Lending(model=self.model, host=host.node, layout=layout, memory_bytes=share.memory_bytes)

    def _fall_short(self, ask: SplitAsk, outcome: Short, candidates: Sequence[Candidate]) -> None:
        memory = {candidate.node: candidate.word.memory_bytes for candidate in candidates}
        lenders = outcome.group or (self._config.node,)
        missing = shortfall(ask, [memory[node] for node in lenders])
        reason = f"waiting for more memory: {missing.message}"
        odd = mismatches(candidates, lenders[0])
        version = next(candidate.rpc_version for candidate in candidates if candidate.node == lenders[0])
        if odd:
            told = ", ".join(f"{_name(one)} speaks {one.rpc_version or 'none'}" for one in odd)
            reason += f"; RPC versions differ: {told}, the others {version or 'none'}"
        able = [one for one in candidates if one.word.memory_bytes and not one.word.bare]
        far = [one for one in able if one.node not in lenders and one not in odd]
        if far:
            reason += f"; too far away or out of reach: {', '.join(map(_name, far))}"
        self._wait_for(reason)

    def _wait_for(self, reason: str) -> None:
        self._seat = None
        self.lending = None
        self.waiting = reason

    # What it says.

    def _own_word(
        self, situation: SplitSituation, facts: ModelFacts, working: Collection[NodeId], now: float
    ) -> SplitState:
        split, seat = self._config.split, self._seat
        seeds = situation.seed == facts.name
        return SplitState(
            model=facts.name,
            fingerprint=facts.fingerprint,
            memory_bytes=situation.offered(facts.name),
            seeds=seeds or self._members.adopted,
            asked=seeds and split.asked,
            max_rtt_ms=split.max_rtt_ms,
            round_trips=self._members.round_trips(situation.members, split.max_rtt_ms, working, now),
            term=seat.layout.term if seat is not None else self._term,
            leads=seat is not None,
            shares=seat.layout.shares if seat is not None else (),
            wish=_wish(situation.options, split.shares) if seeds else SplitPreferences(),
            bare=facts.name not in situation.on_disk,
        )

    def _working(self) -> frozenset[NodeId]:
        """Those that compute together with this node at present."""
        layout = self.layout
        return frozenset(share.node for share in layout.shares) if layout is not None else frozenset()

    def _wake(self, time: float | None) -> None:
        if time is not None:
            self._deadline = time if self._deadline is None else min(self._deadline, time)


def _holds(layout: SplitLayout, group: Sequence[NodeId], offers: Mapping[NodeId, int]) -> bool:
    """Whether all that compute are still there, with as much memory as they gave."""
    return all(share.node in group and offers[share.node] >= share.memory_bytes for share in layout.shares)


def _name(candidate: Candidate) -> str:
    return candidate.name or candidate.node[:10]


def _same_form(present: LaunchPlan, new: LaunchPlan) -> bool:
    """Whether a new plan would change nothing but the term."""
    if present.split is None or new.split is None:
        return present.split is new.split
    return present.split.shares == new.split.shares


def _without_draft(options: LaunchOptions) -> LaunchOptions:
    return msgspec.structs.replace(options, draft=None, use_draft=False)


def _wish(options: LaunchOptions, shares: tuple[float, ...]) -> SplitPreferences:
    return SplitPreferences(context=options.context or 0, slots=options.slots or 0, shares=shares)


def _ask(facts: ModelFacts, situation: SplitSituation, candidates: Sequence[Candidate]) -> SplitAsk:
    """What the whole group wants: each thing by the word of the first, by id, whose user said it."""
    wishes = [candidate.word.wish for candidate in sorted(candidates, key=lambda candidate: candidate.node)]
    context = next((wish.context for wish in wishes if wish.context), None)
    slots = next((wish.slots for wish in wishes if wish.slots), None)
    return SplitAsk(
        facts=facts,
        options=msgspec.structs.replace(situation.options, context=context, slots=slots),
        shares=next((wish.shares for wish in wishes if wish.shares), ()),
        asked=any(candidate.word.asked for candidate in candidates),
        draft=situation.draft(facts.name),
    )
