import asyncio

from tests.support.core_values import node_id

from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.announcement import Standing
from mesh_llm.core.types.events import AnyEvent, ModelAwaited, TargetFailed, TrafficSampled
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.core.types.ports import LoadAsker
from mesh_llm.daemon.traffic import TrafficMeter

LOCAL = Target(node=node_id(1), local=True, address="127.0.0.1:1", term=3)
REMOTE = Target(node=node_id(2), local=False, term=5)
OWN = frozenset({OwnerId("me")})


def meter() -> tuple[TrafficMeter, list[AnyEvent]]:
    events: list[AnyEvent] = []
    return TrafficMeter(events.append), events


def test_local_requests_are_counted_remote_ones_are_not() -> None:
    traffic, _ = meter()
    for target in (LOCAL, LOCAL, REMOTE):
        traffic.started("m", target)
    traffic.finished("m", REMOTE, ok=True, tokens=100, seconds=1.0)
    traffic.finished("m", LOCAL, ok=True, tokens=100, seconds=2.0)
    traffic.wanted("m")
    traffic.wanted("other")
    assert traffic.sample() == TrafficSampled(
        in_flight={"m": 1}, wanted={"m": 1, "other": 1}, served={"m": 1}, tokens_per_second={"m": 50.0}
    )


def test_nothing_new_is_not_told_twice() -> None:
    traffic, _ = meter()
    traffic.started("m", LOCAL)
    assert traffic.sample() is not None
    assert traffic.sample() is not None, "work that goes on is told"
    traffic.finished("m", LOCAL, ok=True, tokens=0, seconds=0.0)
    assert traffic.sample() is not None
    assert traffic.sample() is not None, "that it came to rest is told"
    assert traffic.sample() is None


def answered(traffic: TrafficMeter, tokens: int, seconds: float = 1.0, *, ok: bool = True) -> None:
    traffic.started("m", LOCAL)
    traffic.finished("m", LOCAL, ok=ok, tokens=tokens, seconds=seconds)


def speed_of(traffic: TrafficMeter) -> float:
    sampled = traffic.sample()
    assert sampled is not None
    return sampled.tokens_per_second["m"]


def test_short_or_failed_answers_do_not_count_for_speed() -> None:
    traffic, _ = meter()
    answered(traffic, 100)
    answered(traffic, 7, 0.001)
    answered(traffic, 1000, 0.001, ok=False)
    answered(traffic, 100, 0.0)
    assert speed_of(traffic) == 100.0


def test_the_first_speeds_count_alike_and_later_ones_are_smoothed() -> None:
    traffic, _ = meter()
    answered(traffic, 100)
    answered(traffic, 200)
    assert speed_of(traffic) == 150.0
    for _ in range(4):
        answered(traffic, 150)
    answered(traffic, 250)
    assert speed_of(traffic) == 170.0


def test_a_dead_target_is_told_at_once_with_its_launch() -> None:
    traffic, events = meter()
    traffic.unreachable("m", REMOTE, "reset" * 1000)
    (event,) = events
    assert isinstance(event, TargetFailed)
    assert (event.node, event.model, event.term, len(event.reason)) == (node_id(2), ModelName("m"), 5, 500)


def test_wishes_for_countless_names_are_bounded() -> None:
    traffic, _ = meter()
    for number in range(10_000):
        traffic.wanted(f"junk{number}")
    sampled = traffic.sample()
    assert sampled is not None
    assert len(sampled.wanted) == 256


async def test_idle_waits_for_the_last_request() -> None:
    traffic, _ = meter()
    await asyncio.wait_for(traffic.idle("m"), 20.0)
    traffic.started("m", LOCAL)
    traffic.started("m", LOCAL)
    waiting = asyncio.ensure_future(traffic.idle("m"))  # noqa: TID251 - awaited below
    traffic.finished("m", LOCAL, ok=True, tokens=0, seconds=0.0)
    await asyncio.sleep(0)
    assert not waiting.done()
    traffic.finished("m", LOCAL, ok=True, tokens=0, seconds=0.0)
    await asyncio.wait_for(waiting, 20.0)


def test_only_answers_that_had_the_engines_for_themselves_tell_of_the_machine() -> None:
    traffic, _ = meter()
    told: list[tuple[str, int, float]] = []
    traffic.observe = lambda model, tokens, seconds, _guessed, _context: told.append((model, tokens, seconds))
    traffic.started("m", LOCAL)
    traffic.finished("m", LOCAL, ok=True, tokens=100, seconds=1.0)
    traffic.started("m", LOCAL)
    traffic.started("other", LOCAL)
    traffic.finished("m", LOCAL, ok=True, tokens=100, seconds=2.0)
    # It was alone at its end, but not all the time.
    traffic.finished("other", LOCAL, ok=True, tokens=100, seconds=3.0)
    for tokens, ok in ((9, True), (100, False)):
        traffic.started("m", LOCAL)
        traffic.finished("m", LOCAL, ok=ok, tokens=tokens, seconds=1.0)
    traffic.started("m", REMOTE)
    traffic.started("m", LOCAL)
    traffic.finished("m", LOCAL, ok=True, tokens=50, seconds=4.0)
    assert told == [("m", 100, 1.0), ("m", 50, 4.0)]


async def test_requests_that_wait_are_counted_by_who_asks() -> None:
    posted: list[AnyEvent] = []
    traffic = TrafficMeter(posted.append)
    standings: dict[NodeId, Standing] = {NodeId("b" * 64): "member", NodeId("c" * 64): "client"}
    traffic.node, traffic.standing = NodeId("a" * 64), standings.__getitem__
    member, client = LoadAsker(NodeId("b" * 64), anywhere=False), LoadAsker(NodeId("c" * 64), for_clients=True)
    for asker, change in ((LoadAsker(), 1), (LoadAsker(), 1), (member, 1), (client, 1), (LoadAsker(), -1)):
        traffic.awaiting("m", asker, change)
    events = [one for one in posted if isinstance(one, ModelAwaited)]
    assert [(one.asker[0], one.count, one.here, one.standing) for one in events] == [
        ("a", 1, False, "own"),
        ("a", 2, False, "own"),
        ("b", 1, True, "member"),
        ("c", 1, False, "client"),
        ("a", 1, False, "own"),
    ]


def test_a_model_is_loaded_here_for_those_who_wait_for_nothing_else() -> None:
    """Prompts that may not go everywhere wait for a load here, once nobody waits any more whom any node may answer."""
    traffic, posted = meter()
    traffic.node = NodeId("a")
    mine, ours = LoadAsker(anywhere=False, circle=OWN), LoadAsker(anywhere=False, circle=OWN | {OwnerId("friend")})
    for asker, change in ((mine, 1), (LoadAsker(), 1), (LoadAsker(), -1), (ours, 1), (mine, -1), (ours, -1)):
        traffic.awaiting("m", asker, change)
    events = [one for one in posted if isinstance(one, ModelAwaited)]
    assert [(one.count, one.here, one.circle) for one in events] == [
        (1, True, ("me",)),
        (2, False, None),
        (1, True, ("me",)),
        (2, True, ("me",)),
        (1, True, ("friend", "me")),
        (0, True, ("friend", "me")),
    ]


def test_long_prompts_that_ran_alone_are_learned_from() -> None:
    traffic, _ = meter()
    learned: list[tuple[str, int, float, int]] = []
    traffic.observe_prompt = lambda model, tokens, seconds, cached: learned.append((model, tokens, seconds, cached))

    def answered(target: Target, tokens: int, *, beside: bool = False) -> None:
        for _ in range(2 if beside else 1):
            traffic.started("m", target)
        for _ in range(2 if beside else 1):
            traffic.finished("m", target, ok=True, tokens=10, seconds=1.0)
        traffic.read("m", target, tokens, 2.0, 300)

    answered(LOCAL, 1000)
    answered(LOCAL, 100)
    answered(LOCAL, 1000, beside=True)
    answered(REMOTE, 1000)
    assert learned == [("m", 1000, 2.0, 300)]


def test_an_answer_tells_how_many_tokens_were_before_its_own() -> None:
    traffic, _ = meter()
    before: list[int] = []
    traffic.observe = lambda _model, _tokens, _seconds, _guessed, context: before.append(context)
    traffic.started("m", LOCAL)
    traffic.finished("m", LOCAL, ok=True, tokens=100, seconds=1.0, prompt=1000)
    assert before == [1050]
