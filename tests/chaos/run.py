"""One run: undisturbed answers first, then load and faults for a time, then a look for what was left behind."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from tests.chaos.faults import FAULTS, Fault
from tests.chaos.load import Asked, Load
from tests.chaos.mesh import HOSTS, MODELS, NODES, SHARED, ChaosMesh
from tests.chaos.questions import End, Question, questions
from tests.chaos.verdict import Strike, Verdict, conclude
from tests.chaos.watch import Holding, at_rest, grown, still
from tests.support.node import NodeProcess

Say = Callable[[str], None]

_LATE = 15.0
"""Seconds after which an answer is worth a look."""
_AWAIT_STREAM = 3.0
"""For how long a fault waits for an answer to be under way where it strikes."""


@dataclass(frozen=True)
class Plan:
    """How to run: for so many seconds, or the `most` faults.

    `keep`: a directory for the nodes' logs. `groups`: engines over the split model.
    """

    seconds: float
    seed: int
    most: int = 1_000_000
    clients: int = 5
    pause: float = 0.3
    tokens: int = 400
    texts: int = 2
    hold: tuple[float, float] = (3.0, 7.0)
    calm: tuple[float, float] = (0.5, 2.0)
    whole_within: float = 120.0
    faults: Sequence[Fault] = FAULTS
    keep: Path | None = None
    groups: int = 1


@dataclass
class Outcome:
    """What a run gave. `leaks` by sentence; `took` without the start and the end."""

    plan: Plan
    verdict: Verdict
    asked: list[Asked]
    strikes: list[Strike]
    took: float
    leaks: list[str] = field(default_factory=list[str])

    @property
    def problems(self) -> list[str]:
        """All that must not be."""
        return [*self.verdict.violations, *self.leaks]


async def run(plan: Plan, directory: Path, say: Say) -> Outcome:
    """Do it all. The caller has mounts of its own (`mesh.own_mounts`)."""
    mesh = ChaosMesh(directory, groups=plan.groups)
    try:
        began = time.monotonic()
        await mesh.start()
        say(f"five nodes after {time.monotonic() - began:.1f} s")
        asked = questions(MODELS, plan.tokens, plan.texts, plan.seed)
        expected = await undisturbed(mesh.nodes, asked)
        say(f"{len(expected)} undisturbed answers")
        load = Load(mesh.nodes, asked, expected, clients=plan.clients, pause=plan.pause, seed=plan.seed)
        baselines = {mesh.role(number): await still(node) for number, node in enumerate(mesh.nodes)}
        began = time.monotonic()
        load.start()
        strikes = await _storm(plan, mesh, load, say)
        took = time.monotonic() - began
        await load.stop()
        if load.failure is not None:
            raise load.failure
        whole = all(strike.whole_again for strike in strikes)
        leaks = await _leaks(mesh, baselines) if whole else []
        leaks += await _ends(mesh)
        leaks += await asyncio.to_thread(_lost_tasks, mesh)
        verdict = conclude(load.asked, strikes)
        if plan.keep is not None:
            plan.keep.mkdir(parents=True, exist_ok=True)
            (plan.keep / "requests.txt").write_text("\n".join(_told(load.asked, strikes, began)))
        return Outcome(plan, verdict, load.asked, strikes, took, leaks)
    finally:
        if plan.keep is not None:
            _keep_logs(mesh, plan.keep)
        await mesh.close()


async def undisturbed(nodes: Sequence[NodeProcess], asked: Sequence[Question]) -> dict[tuple[str, str, str, int], str]:
    """The answers that nothing disturbs: each asked whole at one node and as a stream at another; they must agree."""
    expected: dict[tuple[str, str, str, int], str] = {}
    for key in {question.key: None for question in asked}:
        load = Load(nodes, (), expected, clients=0, pause=0.0, seed=0)
        expected[key] = ""
        whole = await load.ask(Question(*key, streamed=False), 0)
        assert whole.got.complete, f"{key}: {whole.end} {whole.why}"
        expected[key] = whole.got.text
        streamed = await load.ask(Question(*key, streamed=True), 2)
        assert streamed.end is End.WHOLE, f"{key}: {streamed.end} {streamed.why}"
    return expected


async def _storm(plan: Plan, mesh: ChaosMesh, load: Load, say: Say) -> list[Strike]:
    random = Random(plan.seed)
    strikes: list[Strike] = []
    until = time.monotonic() + plan.seconds
    for fault in _deck(plan.faults, random):
        await asyncio.sleep(random.uniform(*plan.calm))
        if time.monotonic() >= until or len(strikes) >= plan.most or load.failure is not None:
            return strikes
        strike = await _strike(plan, mesh, load, fault, random)
        strikes.append(strike)
        healed = strike.whole_again - strike.undone if strike.whole_again else float("nan")
        say(f"{strike.fault.name} on node{strike.node}: whole again after {healed:.1f} s")
        if not strike.whole_again:
            return strikes
    return strikes


async def _strike(plan: Plan, mesh: ChaosMesh, load: Load, fault: Fault, random: Random) -> Strike:
    number = random.choice(fault.nodes)
    hold = random.uniform(*plan.hold)
    await load.answering(mesh.ids[number], _AWAIT_STREAM)
    if fault.closes_door:
        load.doors.discard(number)
    strike = Strike(fault, number, mesh.ids[number], time.monotonic(), frozenset(load.open))
    async with fault.strike(mesh, number):
        await asyncio.sleep(hold)
    strike.undone = time.monotonic()
    try:
        await mesh.settled(plan.whole_within)
        strike.whole_again = time.monotonic()
    except AssertionError as error:
        strike.why = str(error)
    load.doors.add(number)
    return strike


def _deck(faults: Sequence[Fault], random: Random) -> Iterator[Fault]:
    """All faults in a random order, again and again: each is done about as often."""
    while True:
        yield from random.sample(faults, len(faults))


async def _leaks(mesh: ChaosMesh, baselines: Mapping[str, Holding]) -> list[str]:
    """What nodes hold more of than who had the same role when the run began; a node's role may have changed."""
    found: list[str] = []
    hosted = baselines[f"host of {SHARED}"].rss_mb
    for number, node in enumerate(mesh.nodes):
        role = mesh.role(number)
        before = baselines[role]
        if number in HOSTS[SHARED]:
            # Memory that a role took is not given back with it.
            before = replace(before, rss_mb=max(before.rss_mb, hosted))
        found += [f"node{number}, {role}: {text}" for text in grown(before, await at_rest(node, before))]
    return found


async def _ends(mesh: ChaosMesh) -> list[str]:
    """Every node ends when told to, and leaves no process."""
    found: list[str] = []
    for number, node in enumerate(mesh.nodes):
        try:
            assert await node.stop(30.0) in {0, 143}, f"ended with {node.process.status}"
        except AssertionError as error:
            found.append(f"node{number}: {error}")
        if left := mesh.lab.processes(number):
            found.append(f"node{number}: {len(left)} processes are left on its host")
    return found


def _lost_tasks(mesh: ChaosMesh) -> list[str]:
    """Tasks of daemons that failed, by their logs: such a node goes on, and something in it does not."""
    found: list[str] = []
    for number, node in enumerate(mesh.nodes):
        for log in sorted((node.options.home / "logs").glob("daemon.log*")):
            lines = log.read_text(errors="replace").splitlines()
            found += [f"node{number}: {line[:300]}" for line in lines if " task failed " in line]
    return found


def _told(asked: Sequence[Asked], strikes: Sequence[Strike], began: float) -> Iterator[str]:
    """The requests that were not answered, or late, and during what: to see whether a user could have had better."""
    for one in asked:
        took = one.ended - one.began
        if one.end is End.WHOLE and took < _LATE:
            continue
        felt = [strike for strike in strikes if strike.began <= one.ended and one.began <= strike.end]
        during = ", ".join(f"{strike.fault.name} on node{strike.node}" for strike in felt) or "no fault"
        question = one.question
        form = "streamed" if question.streamed else "not streamed"
        yield (
            f"{one.began - began:.1f} s, for {took:.1f} s: {question.model}, {question.api}, {form}, at node{one.door}"
            f", during {during}: {one.end or End.HUNG}, status {one.status}: {one.why}"
        )


def _keep_logs(mesh: ChaosMesh, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for node in mesh.nodes:
        home = node.options.home
        (target / f"{home.name}.out").write_text(node.process.text)
        for log in (home / "logs").glob("*.log*"):
            (target / f"{home.name}-{log.name}").write_bytes(log.read_bytes())


__all__ = ["NODES", "Outcome", "Plan", "run", "undisturbed"]
