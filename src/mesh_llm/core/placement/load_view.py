"""What decisions about models that requests wait for are made from: who waits, what is known, and who refused.

`on_demand` chooses the node that loads a model, `local_loads` loads it on this one. Both look through one `LoadView`.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.demand import Usage
from mesh_llm.core.placement.load_hosts import Refusals, place_of, rank_places
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.placement.offload import Pools, plan_launch
from mesh_llm.core.placement.residents import Residents
from mesh_llm.core.placement.split_loads import SplitLoads
from mesh_llm.core.routing.ranking import Awaited
from mesh_llm.core.split.controller import SplitController
from mesh_llm.core.split.outlook import Outlook
from mesh_llm.core.trust.circle import common
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.errors import listed
from mesh_llm.core.types.events import ModelAwaited
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import LaunchPlan, ModelFacts, Role

RANK_AGAIN = 0.5
"""Seconds after which a node is looked for again."""
NOBODY = "no node of the mesh that loads models when they are asked for has its file and the memory for it"
TO_SPLIT = "it waits to be split over several nodes"


@dataclass
class AwaitedModel:
    """A model for which requests wait.

    Attributes:
        model: its name.
        since: when the first of them came.
        askers: who waits, and how many requests.
        asked: the node that is to load it, this one or another that was asked.
        asked_at: since when.
        ranked_at: when a node was last looked for.
        answered_at: when another node last said that it has loaded it.
        by_user: this node's user asked for it to be loaded here.
        state: what becomes of them.
    """

    model: ModelName
    since: float
    askers: dict[NodeId, ModelAwaited] = field(default_factory=dict[NodeId, ModelAwaited])
    asked: NodeId | None = None
    asked_at: float = 0.0
    ranked_at: float = float("-inf")
    answered_at: float = float("-inf")
    by_user: bool = False
    state: Awaited = field(default_factory=Awaited)

    @property
    def members(self) -> Collection[NodeId]:
        """Those of the askers that are members of the mesh. A passive node is none."""
        return [node for node, one in self.askers.items() if one.standing == "member"]

    @property
    def here(self) -> bool:
        """Whether somebody wants it loaded on this node, and on no other."""
        return self.by_user or any(one.here for one in self.askers.values())

    @property
    def circle(self) -> frozenset[OwnerId] | None:
        """Owners whose nodes may see every prompt that waits; None: for some of them, all may."""
        circles = [frozenset(one.circle) for one in self.askers.values() if one.circle is not None]
        return common(circles) if circles and len(circles) == len(self.askers) else None


class LoadView:
    """The node and the mesh as of the last look.

    Attributes:
        config, models: of this node.
        residents: what is loaded here, and what becomes of it.
        splits: whether a model can be split.
        refusals: nodes that do not load a model, and why.
        members: the other nodes.
        now: the time of the look.
        refusal: why this node loads nothing at present, as a clause; empty: it does.
        deadline: when to look again though nothing happens; None: not at all.
    """

    def __init__(self, config: NodeConfig, models: LocalModels, usage: Usage, split: SplitController) -> None:
        self.config = config
        self.models = models
        self.residents = Residents(config, models, usage)
        self.splits = SplitLoads(config, models, split)
        self.refusals = Refusals()
        self.members: Sequence[Member] = ()
        self.now = 0.0
        self.refusal = ""
        self.deadline: float | None = None
        self._by_node: Mapping[NodeId, Member] = {}

    def observe(self, members: Sequence[Member], awaited: Collection[ModelName], now: float, refusal: str) -> None:
        """Look again; `awaited`: the models that requests wait for."""
        if members is not self.members:
            self._by_node = {one.announcement.node: one for one in members}
        self.members, self.now, self.refusal = members, now, refusal
        self.residents.observe(members, awaited, now)
        self.splits.observe(members, now)
        self.deadline = None
        self.refusals.update(self._refusal_facts, now)

    def _refusal_facts(self, model: ModelName, node: NodeId, split: bool) -> Hashable:
        """What a node's answer is built on, as far as it is known here. `split`: other nodes' memory counts, too."""
        others = self.splits.facts if split else None
        if node == self.config.node:
            statuses = tuple((one.model, one.status) for one in self.models.launches)
            mine = (model in self.models.on_disk, model in self.models.excluded, self.refusal, statuses)
            return (mine, self.residents.offer(), others)
        member = self.member(node)
        if member is None:
            return others
        announced = member.announcement
        statuses = tuple((one.model, one.status) for one in announced.serving)
        has = any(one.name == model for one in announced.on_disk)
        return (announced.incarnation, member.suspect, has, statuses, announced.loads, announced.offer, others)

    def member(self, node: NodeId | None) -> Member | None:
        """Another node; None: it is not known, or none is asked for."""
        return self._by_node.get(node) if node is not None else None

    def fits_nowhere_alone(self, model: ModelName) -> bool:
        """Whether no node could load a model alone, whatever it unloads: then it may be split."""
        facts = self.known(model)
        if facts is None:
            return False
        places = [place for member in self.members if (place := place_of(member)) is not None]
        return not rank_places(facts, [*places, self.residents.place()], shared=True, fits=self.fits)

    def fits(self, facts: ModelFacts, pools: Pools) -> bool:
        """Whether a node with this free memory could load a model alone, with this node's options."""
        return isinstance(plan_launch(facts, pools, self.models.options_for(facts.name)), LaunchPlan)

    def known(self, model: ModelName) -> ModelFacts | None:
        """The model, as this node or another one has it; else as the catalogue has it."""
        own = self.models.on_disk.get(model)
        if own is not None:
            return own
        others = (one for member in self.members for one in member.announcement.on_disk if one.name == model)
        return next(others, None) or next((one for one in self.config.on_demand.catalogue if one.name == model), None)

    def too_big(self, facts: ModelFacts, refused: LoadRefused, outlook: Outlook | None = None) -> str:
        """Why a model whose file is here is loaded neither here nor on several nodes together."""
        pinned = [launch.model for launch in self.models.launches if self.residents.is_pinned(launch.model)]
        text = refused.message.rstrip(".") + (f"; {listed(pinned)} is pinned and stays" if pinned else "")
        if refused.code != "does_not_fit":
            return text
        return self.splits.why_not(facts, text, outlook)

    def barred(self, model: ModelName, facts: ModelFacts | None) -> str:
        """Why a model is not loaded here, whatever else is; empty: it may be."""
        if self.refusal:
            return self.refusal
        if model in self.models.excluded:
            launch = self.models.launches.get(model)
            dropped = f"it was dropped there; to serve it again: mesh-llm load {model}"
            return (self.models.refused.get(model) or (launch.reason if launch is not None else dropped)).rstrip(".")
        return NOBODY if facts is None else ""

    def note_refusal(self, model: ModelName, node: NodeId, why: str, now: float, seconds: float = 0.0) -> None:
        """A node does not load a model: it is not asked again before something has changed, or time has passed.

        A passive node sees nothing that could change: the node that it asks remembers for it.
        """
        split = self.fits_nowhere_alone(model)
        seconds = 0.0 if self.config.role is Role.CLIENT else max(seconds, self.config.on_demand.refused)
        facts = self._refusal_facts(model, node, split)
        self.refusals.add(model, node, why, now, now + seconds, facts, split=split)

    def wake(self, time: float) -> None:
        """Evaluate again at this time, or earlier."""
        self.deadline = time if self.deadline is None else min(self.deadline, time)
