import asyncio
import errno
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from tests.support.core_values import facts, node_id, plan

from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.effects import Notice, StartEngine, StopEngine
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, EngineExited, EngineReady
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import Capacity, LaunchOptions, ModelKind, SplitLayout, SplitShare
from mesh_llm.core.types.model_settings import EngineOptions
from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.daemon.engines import Engines
from mesh_llm.daemon.model_registry import Machine, ModelRegistry
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.engine.process import Command
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, Exit, Supervisor
from mesh_llm.models.library.library import FactsCache, Library, LocalModel

M = ModelName("m")
READY = EngineReadyInfo(address="127.0.0.1:5", key="k", context=100, slots=2, embeddings=True)


class FakeEngine:
    """A child whose life the test decides."""

    pid = 1

    @property
    def running(self) -> bool:
        return not self.end.done()

    def kill(self) -> None:
        self.end.set_result(Exit(code=-9, reason="killed", never_ready=not self.becomes.done(), asked=True))

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.becomes: asyncio.Future[EngineReadyInfo] = loop.create_future()
        self.end: asyncio.Future[Exit] = loop.create_future()
        self.stops = 0

    async def ready(self) -> EngineReadyInfo | Exit:
        await asyncio.wait({self.becomes, self.end}, return_when=asyncio.FIRST_COMPLETED)
        return self.end.result() if self.end.done() else self.becomes.result()

    async def wait(self) -> Exit:
        return await asyncio.shield(self.end)

    async def stop(self) -> Exit:
        self.stops += 1
        if not self.end.done():
            self.end.set_result(Exit(code=0, reason="stopped", never_ready=not self.becomes.done(), asked=True))
        return await self.wait()


def machine(library: Library, source: EngineSource | None = None) -> Machine:
    cache = FactsCache()
    return Machine(
        source=source,
        devices=("CUDA1",) if source is not None else (),
        capacity=Capacity(),
        registry=ModelRegistry(library, cache),
        cache=cache,
    )


class World:
    """Engines over a fake source and supervisor; `events` is what the core would hear.

    The model `ahead` has a head of its own that guesses.
    """

    name = "embedded"

    def __init__(self, *, problem: Exception | None = None) -> None:
        self.problem = problem
        self.events: asyncio.Queue[AnyEvent] = asyncio.Queue()
        self.specs: list[EngineSpec] = []
        self.notices: list[Notice] = []
        self.children: list[FakeEngine] = []
        self.launched = asyncio.Event()
        self.may_launch = asyncio.Event()
        self.may_launch.set()
        draft = LocalModel(facts("tiny-draft", kind=ModelKind.DRAFT), (Path("/models/tiny-draft.gguf"),), builtin=True)
        models = [
            LocalModel(
                facts("m"), (Path("/models/m-1.gguf"), Path("/models/m-2.gguf")), projector=Path("/models/mmproj.gguf")
            ),
            LocalModel(facts("e", kind=ModelKind.EMBEDDING), (Path("/models/e.gguf"),)),
            LocalModel(facts("tiny"), (Path("/models/tiny.gguf"),), builtin=True),
            LocalModel(msgspec.structs.replace(facts("ahead"), layers=47, mtp_layers=1), (Path("/models/ahead.gguf"),)),
            LocalModel(msgspec.structs.replace(facts("flat"), layers=12, mtp_layers=1), (Path("/models/flat.gguf"),)),
        ]
        library = Library(models={model.name: model for model in models}, drafts={draft.name: draft})
        self.traffic = TrafficMeter(self.events.put_nowait)
        self.engines = Engines(
            machine(library, cast("EngineSource", self)),
            cast("Supervisor", self),
            self.traffic,
            self.events.put_nowait,
            notify=self.notices.append,
        )

    async def server_command(self, source: EngineSource, spec: EngineSpec) -> Command:
        assert source is self
        if self.problem is not None:
            raise self.problem
        self.specs.append(spec)
        await self.may_launch.wait()
        return Command(argv=("x",))

    async def launch(self, command: Command, name: str) -> FakeEngine:
        self.children.append(FakeEngine())
        self.launched.set()
        return self.children[-1]

    def start(self, term: int = 1, model: str = "m", **options: Any) -> None:
        self.engines.start(StartEngine(plan=plan(model), options=LaunchOptions(**options), term=Term(term)))

    async def event(self) -> AnyEvent:
        return await asyncio.wait_for(self.events.get(), 20.0)

    async def child(self) -> FakeEngine:
        """The child, once it was launched and its readiness is awaited."""
        await asyncio.wait_for(self.launched.wait(), 20.0)
        return self.children[-1]


async def test_a_launch_is_ready_and_ends() -> None:
    world = World()
    world.start()
    child = await world.child()
    child.becomes.set_result(READY)
    assert await world.event() == EngineReady(
        model=M, term=Term(1), address="127.0.0.1:5", context=100, slots=2, embeddings=True
    )
    # The core's events are journalled: the key is not among them.
    assert world.engines.key_of("127.0.0.1:5") == "k"
    child.end.set_result(Exit(code=-9, reason="killed", never_ready=False, asked=False))
    assert await world.event() == EngineExited(model=M, term=Term(1), code=-9, reason="killed", never_ready=False)
    assert world.engines.key_of("127.0.0.1:5") == ""
    await world.engines.close()


async def test_a_launch_that_cannot_begin_ends_with_the_reason() -> None:
    world = World(problem=MeshError(code="x", message="No engine.", hint="Get one."))
    world.start()
    assert await world.event() == EngineExited(
        model=M, term=Term(1), code=1, reason="No engine. Get one.", never_ready=True
    )
    world.problem = None
    world.start(2, "vanished")
    event = await world.event()
    assert isinstance(event, EngineExited)
    assert "not there any more" in event.reason
    await world.engines.close()


@pytest.mark.parametrize(
    ("problem", "said"),
    [
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (ConnectionResetError("x"), "x"),
        (KeyError("a bug"), "see mesh-llm logs"),
    ],
)
async def test_whatever_stops_a_launch_it_ends_so_that_its_memory_is_free(problem: Exception, said: str) -> None:
    world = World(problem=problem)
    world.start()
    event = await world.event()
    assert isinstance(event, EngineExited)
    assert event.never_ready
    assert said in event.reason
    await world.engines.close()


async def test_nor_does_an_engine_stay_that_nobody_can_ask() -> None:
    world = World()
    world.start()
    child = await world.child()
    child.becomes.set_exception(OSError(errno.EMFILE, "Too many open files"))
    event = await world.event()
    assert isinstance(event, EngineExited)
    assert not child.running
    await world.engines.close()


async def test_how_an_engine_ended_is_known_afterwards() -> None:
    world = World()
    engines = world.engines
    assert await engines.end_of("m", 1) is EngineEnd.EXPLAINED
    world.start()
    child = await world.child()
    child.becomes.set_result(READY)
    await world.event()
    asking = asyncio.gather(engines.end_of("m", 1))
    child.end.set_result(Exit(code=-11, reason="SIGSEGV", never_ready=False, asked=False))
    assert await asking == [EngineEnd.CRASHED]
    assert await engines.end_of("m", 1) is EngineEnd.CRASHED
    assert await engines.end_of("m", 2) is EngineEnd.EXPLAINED
    world.launched.clear()
    world.start(2)
    child = await world.child()
    child.becomes.set_result(READY)
    engines.stop(StopEngine(model=M, term=Term(2), drain_seconds=0.0))
    assert await engines.end_of("m", 2) is EngineEnd.EXPLAINED
    await engines.close()


async def test_stopping_before_it_was_launched_launches_nothing() -> None:
    world = World()
    world.may_launch.clear()
    world.start()
    await asyncio.sleep(0)
    world.engines.stop(StopEngine(model=M, term=Term(1)))
    world.may_launch.set()
    event = await world.event()
    assert isinstance(event, EngineExited)
    assert world.children == []
    await world.engines.close()


async def test_stopping_waits_for_requests_and_not_for_ever() -> None:
    world = World()
    target = Target(node=node_id(1), local=True)
    world.start()
    child = await world.child()
    child.becomes.set_result(READY)
    await world.event()
    world.traffic.started("m", target)
    world.engines.stop(StopEngine(model=M, term=Term(1), drain_seconds=60.0))
    for _ in range(10):
        await asyncio.sleep(0)
    assert child.stops == 0
    world.engines.stop(StopEngine(model=M, term=Term(1), drain_seconds=0.01))
    assert isinstance(await world.event(), EngineExited)
    assert child.stops == 1
    world.engines.stop(StopEngine(model=M, term=Term(1)))
    await world.engines.close()


async def test_stopping_when_the_last_request_ends() -> None:
    world = World()
    target = Target(node=node_id(1), local=True)
    world.start()
    (await world.child()).becomes.set_result(READY)
    await world.event()
    world.traffic.started("m", target)
    world.engines.stop(StopEngine(model=M, term=Term(1), drain_seconds=60.0))
    await asyncio.sleep(0)
    world.traffic.finished("m", target, ok=True, tokens=1, seconds=1.0)
    assert isinstance(await world.event(), EngineExited)
    await world.engines.close()


async def test_an_old_terms_stop_does_not_touch_the_new_launch() -> None:
    world = World()
    world.start(2)
    child = await world.child()
    world.engines.stop(StopEngine(model=M, term=Term(1)))
    for _ in range(10):
        await asyncio.sleep(0)
    assert child.stops == 0
    await world.engines.close()


@pytest.mark.parametrize(
    ("model", "found", "options", "draft", "pooling"),
    [
        ("m", None, {}, None, "mean"),
        ("m", "tiny-draft", {"draft": "/d.gguf"}, Path("/d.gguf"), "mean"),
        ("m", None, {"draft": "/d.gguf", "use_draft": False}, None, "mean"),
        ("e", None, {}, None, "mean"),
        ("tiny", "tiny-draft", {}, Path("/models/tiny-draft.gguf"), "mean"),
        ("tiny", "tiny-draft", {"use_draft": False}, None, "mean"),
        ("tiny", "gone", {}, None, "mean"),
    ],
)
async def test_what_is_run(
    model: str, found: str | None, options: dict[str, Any], draft: Path | None, pooling: str
) -> None:
    world = World()
    planned = msgspec.structs.replace(plan(model), draft=found)
    effect = StartEngine(plan=planned, options=LaunchOptions(**options, draft_max=7), term=Term(1))
    spec = world.engines.spec(effect)
    assert (spec.alias, spec.context, spec.slots, spec.devices, spec.port) == (model, 2048, 4, ("CUDA1",), 0)
    assert (spec.draft, spec.draft_max, spec.pooling) == (draft, 7, pooling)
    assert spec.mmproj == (Path("/models/mmproj.gguf") if model == "m" else None)
    assert spec.model == Path("/models/m-1.gguf" if model == "m" else f"/models/{model}.gguf")


@pytest.mark.parametrize(
    ("chosen", "found", "draft", "expected"),
    [
        ("", "tiny-draft", None, "draft-simple"),
        ("draft", "tiny-draft", None, "draft-simple"),
        ("eagle3", None, "/d.gguf", "draft-eagle3"),
        ("eagle3", None, None, ""),
        ("draft", None, "/d.gguf", "draft-simple"),
        ("ngram", None, None, "ngram-map-k"),
        ("ngram-mod", None, None, "ngram-mod"),
        ("off", None, None, ""),
        ("", None, None, "ngram-map-k"),
    ],
)
async def test_how_tokens_are_guessed(chosen: str, found: str | None, draft: str | None, expected: str) -> None:
    world = World()
    options = LaunchOptions(draft=draft, engine=EngineOptions(speculation=chosen))
    planned = msgspec.structs.replace(plan("tiny"), draft=found)
    spec = world.engines.spec(StartEngine(plan=planned, options=options, term=Term(1)))
    assert (spec.speculation_type, spec.while_it_pays) == (expected, not chosen)
    # Of what nobody named, an engine that cannot be switched has only a draft.
    assert spec.unswitched.speculation_type == ("" if spec.draft is None and not chosen else expected)


def over_two(last: int = 5, groups: int = 1) -> SplitLayout:
    layers = (6, 5, last)
    shares = tuple(SplitShare(node=node_id(number), layers=count) for number, count in enumerate(layers))
    return SplitLayout(term=1, shares=shares, groups=groups)


def ahead(chosen: str, split: SplitLayout | None = None, **options: Any) -> StartEngine:
    """A launch of the model with a head of its own; a draft was found for it."""
    planned = msgspec.structs.replace(plan("ahead"), draft=ModelName("tiny-draft"), split=split)
    more = LaunchOptions(use_draft=chosen in {"", "draft"}, engine=EngineOptions(speculation=chosen), **options)
    return StartEngine(plan=planned, options=more, term=Term(1))


@pytest.mark.parametrize(("chosen", "expected"), [("", "draft-mtp"), ("mtp", "draft-mtp"), ("off", ""),
                                                  ("draft", "draft-simple"), ("ngram", "ngram-map-k")])  # fmt: skip
async def test_heads_of_its_own_come_before_a_draft(chosen: str, expected: str) -> None:
    spec = World().engines.spec(ahead(chosen))
    assert (spec.speculation_type, spec.while_it_pays) == (expected, not chosen)
    # They guess all that they may, however few are wanted.
    assert spec.draft_max == (4 if expected == "draft-mtp" else 16)
    assert World().engines.spec(ahead(chosen, draft_max=9)).draft_max == 9


@pytest.mark.parametrize(("chosen", "expected"), [("", "draft-simple"), ("mtp", "draft-mtp")])
async def test_a_head_beside_few_layers_costs_too_much_unasked(chosen: str, expected: str) -> None:
    effect = ahead(chosen)
    effect = msgspec.structs.replace(effect, plan=msgspec.structs.replace(effect.plan, model=ModelName("flat")))
    assert World().engines.spec(effect).speculation_type == expected
    split = msgspec.structs.replace(effect, plan=msgspec.structs.replace(effect.plan, split=over_two()))
    assert World().engines.spec(split).speculation_type == "draft-mtp"


@pytest.mark.parametrize(
    ("chosen", "expected"), [("", "draft-simple"), ("mtp", "ngram-map-k"), ("draft", "draft-simple")]
)
async def test_a_split_model_whose_heads_are_far_guesses_otherwise_and_says_so(chosen: str, expected: str) -> None:
    world = World()
    effect = ahead(chosen, over_two(last=1))
    assert world.engines.spec(effect).speculation_type == expected
    world.engines.start(effect)
    await world.child()
    said = [notice.text for notice in world.notices if notice.code == "spec_instead"]
    assert len(said) == (chosen == "mtp")
    assert all("by n-grams, not by --spec mtp: the last machine has no other layers" in text for text in said)
    assert all("Use --spec auto" in text for text in said)


async def test_the_heads_of_a_split_model_are_on_the_host() -> None:
    spec = World().engines.spec(ahead("", over_two()))
    assert (spec.speculation_type, spec.mtp_layers, spec.draft) == ("draft-mtp", 1, None)
    # Several engines would guess for each other's tokens.
    several = World().engines.spec(ahead("mtp", over_two(groups=2)))
    assert (several.speculation_type, several.mtp_layers) == ("", 0)


async def test_an_engine_that_does_not_start_with_its_own_heads_guesses_otherwise() -> None:
    world = World()
    world.engines.start(ahead(""))
    child = await world.child()
    world.launched.clear()
    child.end.set_result(Exit(code=-6, reason="MTP block missing", never_ready=True, asked=False))
    second = await world.child()
    assert [spec.speculation_type for spec in world.specs] == ["draft-mtp", "draft-simple"]
    second.becomes.set_result(READY)
    assert isinstance(await world.event(), EngineReady)
    # It is not tried again, and who named it is told.
    assert world.engines.spec(ahead("")).speculation_type == "draft-simple"
    world.engines.start(ahead("mtp"))
    assert [notice.code for notice in world.notices] == []
    world.launched.clear()
    await world.child()
    assert [notice.code for notice in world.notices] == ["spec_instead"]
    assert world.specs[-1].speculation_type == "ngram-map-k"


async def test_a_model_without_heads_of_its_own_cannot_guess_by_them() -> None:
    world = World()
    options = LaunchOptions(engine=EngineOptions(speculation="mtp"))
    with pytest.raises(MeshError, match="no heads of its own"):
        world.engines.spec(StartEngine(plan=plan("tiny"), options=options, term=Term(1)))


@pytest.mark.parametrize(
    ("kind", "pooling", "encoder", "context", "slots", "expected"),
    [
        (ModelKind.CHAT, "", False, 4096, 4, ("mean", 512)),
        (ModelKind.EMBEDDING, "last", False, 4096, 4, ("last", 512)),
        (ModelKind.EMBEDDING, "cls", True, 2048, 4, ("cls", 2048)),
        (ModelKind.EMBEDDING, "none", True, 300, 1, ("mean", 512)),
        (ModelKind.RERANK, "", True, 8192, 3, ("rank", 8193)),
        (ModelKind.RERANK, "rank", False, 8192, 4, ("rank", 512)),
    ],
)
def test_an_input_that_cannot_be_divided_has_room_in_one_batch(
    kind: ModelKind, pooling: str, encoder: bool, context: int, slots: int, expected: tuple[str, int]
) -> None:
    world = World()
    there = msgspec.structs.replace(facts("x", kind=kind), pooling=pooling, encoder=encoder)
    here = machine(Library(models={there.name: LocalModel(there, (Path("/x.gguf"),))}))
    engines = Engines(here, cast("Supervisor", None), world.traffic, world.events.put_nowait)
    planned = msgspec.structs.replace(plan("x"), context=context, slots=slots)
    spec = engines.spec(StartEngine(plan=planned, options=LaunchOptions(), term=Term(1)))
    assert (spec.pooling, spec.micro_batch) == expected
    assert spec.batch >= spec.micro_batch
    assert spec.even_micro_batch == spec.micro_batch


def test_a_plan_says_how_many_tokens_of_a_prompt_are_computed_at_once() -> None:
    world = World()
    layout = SplitLayout(term=1, shares=(SplitShare(node=node_id(1), layers=16),), micro_batch=128)
    planned = msgspec.structs.replace(plan("m"), split=layout)
    spec = world.engines.spec(StartEngine(plan=planned, options=LaunchOptions(), term=Term(1)))
    assert (spec.micro_batch, spec.batch) == (128, 2048)


def test_engines_over_one_split_model_divide_its_slots_and_guess_nothing() -> None:
    world = World()
    layout = SplitLayout(term=1, shares=(SplitShare(node=node_id(1), layers=16),), groups=2)
    planned = msgspec.structs.replace(plan("m"), split=layout, slots=8)
    options = LaunchOptions(engine=EngineOptions(speculation="ngram-mod"))
    spec = world.engines.spec(StartEngine(plan=planned, options=options, term=Term(1)))
    assert (spec.slots, spec.context, spec.speculation) == (4, planned.context, "")


async def test_a_projector_that_the_engine_does_not_start_with_is_set_aside_and_said() -> None:
    world = World()
    world.start()
    child = await world.child()
    world.launched.clear()
    child.end.set_result(Exit(code=1, reason="mmproj mismatch", never_ready=True, asked=False))
    second = await world.child()
    second.becomes.set_result(READY)
    assert isinstance(await world.event(), EngineReady)
    assert [spec.mmproj for spec in world.specs] == [Path("/models/mmproj.gguf"), None]
    (notice,) = world.notices
    assert (notice.code, "/models/mmproj.gguf" in notice.text) == ("projector_unfit", True)
    # Without one there is nothing more to leave out.
    second.end.set_result(Exit(code=1, reason="x", never_ready=False, asked=False))
    assert isinstance(await world.event(), EngineExited)
    world.launched.clear()
    world.start(2)
    third = await world.child()
    third.end.set_result(Exit(code=1, reason="x", never_ready=True, asked=False))
    assert isinstance(await world.event(), EngineExited)
    assert world.specs[-1].mmproj is None
    await world.engines.close()


async def test_a_node_without_an_engine() -> None:
    events: asyncio.Queue[AnyEvent] = asyncio.Queue()
    engines = Engines(machine(Library()), cast("Supervisor", None), TrafficMeter(events.put_nowait), events.put_nowait)
    engines.start(StartEngine(plan=plan("m"), options=LaunchOptions(), term=Term(1)))
    event = await asyncio.wait_for(events.get(), 20.0)
    assert isinstance(event, EngineExited)
    assert "runs no engine" in event.reason
    await engines.close()
