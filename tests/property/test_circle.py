"""No sequence of faults makes a prompt leave its circle: whatever nodes announce, die, form or break."""

from dataclasses import dataclass, field
from hashlib import sha512

from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import config, member, node_id, serving

from mesh_llm.core.routing.ranking import RoutingSnapshot, Target, rank
from mesh_llm.core.routing.table import RoutingTable
from mesh_llm.core.trust.circle import Circle, Owners, Privacy, outsiders, strictest, within
from mesh_llm.core.types.announcement import Member, Ownership, SplitState
from mesh_llm.core.types.events import TargetFailed
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import ModelStatus, SplitShare

MODEL = ModelName("m")
ME = node_id(1)
NODES = [node_id(number) for number in range(2, 7)]
OWNERS = [OwnerId(letter * 64) for letter in "abc"]
NOW = 1_000.0


def signed(owner: OwnerId, node: NodeId, expires: int = 10_000) -> Ownership:
    return Ownership(owner=owner, issued=0, expires=expires, signature=sha512((owner + node).encode()).digest())


@dataclass
class Host:
    """A node as it is, and as it announces itself."""

    owner: OwnerId | None = None
    expires: int = 10_000
    status: ModelStatus = ModelStatus.WARM
    workers: tuple[NodeId, ...] = ()
    announced_workers: tuple[NodeId, ...] = ()
    suspect: bool = False
    alive: bool = True


@dataclass
class World:
    """Nodes that do what they like, and one that routes."""

    hosts: dict[NodeId, Host] = field(
        default_factory=lambda: {node: Host(owner=OWNERS[at % 2]) for at, node in enumerate(NODES)}
    )
    table: RoutingTable = field(default_factory=lambda: RoutingTable(config()))
    term: int = 1

    def owners(self) -> dict[NodeId, Ownership]:
        return {n: signed(h.owner, n, h.expires) for n, h in self.hosts.items() if h.owner is not None}

    def members(self) -> list[Member]:
        return [self._member(node, host) for node, host in self.hosts.items() if host.alive]

    def _member(self, node: NodeId, host: Host) -> Member:
        shares = (SplitShare(node=node, layers=1), *(SplitShare(node=one, layers=1) for one in host.announced_workers))
        split = SplitState(model=MODEL, leads=True, shares=shares, term=1) if host.announced_workers else None
        made = member(
            NODES.index(node) + 2,
            serving("m", host.status, term=self.term),
            ownership=signed(host.owner, node, host.expires) if host.owner is not None else None,
            split=split,
            suspect=host.suspect,
        )
        assert made.announcement.node == node
        return made

    def snapshot(self, now: float) -> RoutingSnapshot:
        members = self.members()
        self.table.observe(members, now)
        self.table.rebuild(
            own=(), addresses={}, members=members, round_trips={}, on_disk={}, wanted=(), accepting=True, now=now
        )
        return self.table.snapshot


def seen_by(world: World, target: Target, circle: Circle, now: float) -> set[NodeId]:
    """Who sees a prompt that is sent to a target: the host checks its workers as they are then."""
    host = world.hosts[target.node]
    there = Target(node=target.node, local=True, workers=host.workers)
    if outsiders(there, circle, world.owners(), (target.node, ME), now):
        return {target.node}
    return {target.node, *host.workers}


nodes, owners = st.sampled_from(NODES), st.one_of(st.none(), st.sampled_from(OWNERS))
workers = st.lists(nodes, unique=True, max_size=2).map(tuple)
Step = tuple[str, NodeId, object]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("owner"), nodes, owners),
        st.tuples(st.just("expires"), nodes, st.sampled_from((500, 10_000))),
        st.tuples(st.just("status"), nodes, st.sampled_from((ModelStatus.WARM, ModelStatus.LOADING))),
        st.tuples(st.just("workers"), nodes, workers),
        st.tuples(st.just("announced_workers"), nodes, workers),
        st.tuples(st.just("suspect"), nodes, st.booleans()),
        st.tuples(st.just("alive"), nodes, st.booleans()),
        st.tuples(st.just("fail"), nodes, st.none()),
        st.tuples(st.just("ask"), nodes, st.none()),
    ),
    max_size=30,
)


@given(
    faults=steps,
    privacy=st.sampled_from(Privacy),
    own=st.sampled_from(("", *OWNERS)),
    group=st.lists(st.sampled_from(OWNERS), unique=True, max_size=2),
)
def test_no_sequence_of_faults_makes_a_prompt_leave_its_circle(
    faults: list[Step], privacy: Privacy, own: str, group: list[OwnerId]
) -> None:
    """A request is sent to one target after the other, as each is lost, and the answer resumed at the next."""
    world, circle = World(), Owners(own=own, group=tuple(group)).circle(privacy)
    now = NOW
    for kind, node, value in [*faults, ("ask", NODES[0], None)]:
        now += 10.0
        if kind == "ask":
            snapshot = world.snapshot(now)
            route = snapshot.models.get(MODEL)
            for target in rank(within(route, circle, snapshot, (ME,), now), {}) if route is not None else ():
                seen = seen_by(world, target, circle, now) - {ME}
                if circle is None:
                    continue
                for one in seen:
                    host = world.hosts[one]
                    assert host.owner in circle
                    assert now < host.expires
                # It is lost in the middle of the answer: the next one gets the prompt too.
                failed = TargetFailed(node=target.node, model=MODEL, reason="lost", term=target.term)
                world.table.target_failed(failed, world.members(), now)
        elif kind == "fail":
            world.table.target_failed(TargetFailed(node=node, model=MODEL, reason="lost"), world.members(), now)
        else:
            setattr(world.hosts[node], kind, value)
            world.term += kind in {"workers", "status"}


@given(wishes=st.lists(st.sampled_from(Privacy), min_size=1, max_size=4))
def test_a_wish_only_narrows(wishes: list[Privacy]) -> None:
    order = list(Privacy)
    assert order.index(strictest(*wishes)) == min(order.index(one) for one in wishes)
    made = Owners(own=OWNERS[0], group=(OWNERS[1],))
    own, group = made.circle(Privacy.OWN), made.circle(Privacy.GROUP)
    assert own is not None
    assert group is not None
    assert own < group
    assert made.circle(Privacy.ANY) is None
    assert Owners().circle(Privacy.OWN) == frozenset()
