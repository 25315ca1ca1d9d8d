"""What `prompts` and `clients` share: their options, and the ways of running a model on one machine and on several.

One machine is the host alone. On several, the host computes its part too: two machines are a host and one worker.
llama.cpp's own RPC runs in two layouts, with warm caches. *Stock* is what mesh-llm's nodes ask of llama.cpp: the host's
layers on its processor, the output layer there, embeddings on. *Stock, pipelined* is what makes llama.cpp pipeline
prompts over devices: all layers on RPC servers, of which the host has one, no tensor override, no embeddings.
*mesh-llm, f16* and *mesh-llm, q8* round activations on their way (`--wire`); they run only where they are asked for.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from bench.common import machine
from bench.split.lab import STOCK_PORT, Lab
from bench.split.stand_in import Pace
from tests.netlab.lab import NetLab
from tests.support.gguf_models import cached_model

from mesh_llm.core.performance.prediction import Link, prompt_seconds
from mesh_llm.core.performance.wire import wired_prompt_seconds
from mesh_llm.core.split.layout import pipelined_tokens
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelFacts, Speed, SplitLayout, SplitShare, Wire, WireFormat
from mesh_llm.engine.speed import measure_speed
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.models.tensor_cache.digests import DigestStore

WAYS = {
    "solo": "one machine",
    "stock": "stock RPC",
    "pipelined": "stock RPC, pipelined",
    "ours": "mesh-llm",
    "groups": "mesh-llm, groups",
    "f16": "mesh-llm, f16",
    "q8": "mesh-llm, q8",
}
USUAL = ("solo", "stock", "pipelined", "ours")
"""Those that run where nothing else is said. The others are several engines of mesh-llm, and mesh-llm with `--wire`."""

_OURS: dict[str, WireFormat] = {"ours": "f32", "groups": "f32", "f16": "f16", "q8": "q8"}


WHOLE = 512
"""Tokens that an engine computes at once, if nothing says otherwise."""


def numbers(text: str) -> list[int]:
    """`1,2,3`."""
    return [int(word) for word in text.split(",")]


def parser(about: str | None) -> argparse.ArgumentParser:
    """The options of both."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--machines", type=numbers, default=[3], help="how many share the model, as in 2,3,4,8")
    found.add_argument("--delays", default="0", help="one way, ms")
    found.add_argument("--megabits", type=float, default=0.0, help="rate of each link, Mbit/s; 0: no limit")
    found.add_argument("--ways", default=list(USUAL), type=lambda words: words.split(","), help=f"of {', '.join(WAYS)}")
    found.add_argument("--groups", type=int, default=0, help="engines over one split; 0: as many as machines")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--micro-batch", type=int, default=0, help=f"of all ways; 0: {WHOLE}, and what mesh-llm chooses")
    found.add_argument("--model", help="a generated model; long (160 MB) by default, stand-in for stand-ins")
    found.add_argument("--models", help="directory that keeps generated models")
    found.add_argument("--threads", type=int, default=1, help="of each engine")
    found.add_argument("--stand-in", action="store_true", help="engines take a set time instead of computing")
    found.add_argument("--prompt-rate", type=float, default=500.0, help="tokens/s of a prompt on one stand-in")
    found.add_argument("--answer-rate", type=float, default=25.0, help="tokens/s of one answer on one stand-in")
    found.add_argument("--slow-motion", type=float, default=10.0, help="of stand-ins: all is so many times slower")
    found.add_argument("--json", type=Path)
    found.set_defaults(spec="")
    return found


@dataclass
class Measured:
    """One round of one way.

    Attributes:
        machines: that share the model.
        delay_ms: one way, of each link.
        size: tokens of the prompt, or clients.
        values: what was measured, by name; times as without slow motion.
        texts: what the model said.
        busy: part of the time that this machine's cores were busy, 0.0 to 1.0.
    """

    way: str
    machines: int
    delay_ms: float
    size: int
    values: dict[str, float]
    texts: list[str]
    busy: float


def say(result: Measured, unit: str, rate: str) -> None:
    """Show one round while the others are still to come. `unit`: of its size; `rate`: which value is tokens/s."""
    print(
        f"  {WAYS.get(result.way, result.way)} on {result.machines} at {result.delay_ms:g} ms: {result.size} {unit}, "
        f"{result.values[rate]:.1f} tokens/s, busy {result.busy:.2f}",
        file=sys.stderr,
        flush=True,
    )


class Runs:
    """A lab, and the ways in it."""

    def __init__(self, arguments: argparse.Namespace, lab: Lab, facts: ModelFacts) -> None:
        self.arguments = arguments
        self.lab = lab
        self._facts = facts
        self.slow = arguments.slow_motion if arguments.stand_in else 1.0
        self._pace = _pace(arguments)
        self._delay = 0.0

    def predicted(self, way: str, machines: int, tokens: int) -> float | None:
        """Tokens per second of a prompt, as `mesh-llm plan` predicts them before the first one; None where it does not.

        From this machine's speed, measured now, and the links'; with stand-ins from what is set.
        """
        if way != "solo" and way not in _OURS:
            return None
        arguments, facts = self.arguments, self._facts
        if arguments.stand_in:
            speed: Speed | None = self._pace.speed(facts)
            way_there = Link(one_way_seconds=self._delay * 1e-3, bytes_per_second=arguments.megabits * 125e3)
            links = dict.fromkeys(self.lab.nodes, way_there)
        else:
            speed = asyncio.run(measure_speed(("CPU",)))
            said = {node: self.lab.host.say("link", node=node) for node in self.lab.nodes[: machines - 1]}
            links = {node: msgspec.convert(link, Link) for node, link in said.items()}
        if speed is None:
            return None
        if speed.cores > arguments.threads:
            more = speed.cores / arguments.threads
            batch, attention = speed.batch.slowed(more), speed.attention.slowed(more)
            speed = msgspec.structs.replace(speed, batch=batch, attention=attention, cores=arguments.threads)
        if way == "solo":
            seconds = prompt_seconds(facts, speed, tokens)
        else:
            nodes = [NodeId("0" * 64), *map(NodeId, self.lab.nodes[: machines - 1])]
            shares = zip(nodes, whole_layers(facts.layers, machines), strict=True)
            parts = tuple(SplitShare(node=node, layers=count) for node, count in shares)
            layout = SplitLayout(term=1, shares=parts, micro_batch=self.micro_batch(way, machines))
            # Workers are as far from each other as from the host.
            among = {(one, other): links[one] for one in nodes[1:] for other in nodes[1:] if one != other}
            ways = {(nodes[0], NodeId(node)): link for node, link in links.items()} | among
            wire = Wire(prompts=_OURS[way], tokens=_OURS[way])
            found = wired_prompt_seconds(facts, layout, dict.fromkeys(nodes, speed), ways, wire, tokens)
            seconds = None if found is None else found.total()
        return None if not seconds else tokens / seconds

    def distance(self, delay: float) -> None:
        """How far all machines are from each other."""
        self._delay = delay
        self.lab.delay(delay * self.slow, self.arguments.megabits / self.slow)

    def micro_batch(self, way: str, machines: int) -> int:
        """Tokens of a prompt that are computed at once."""
        return self.arguments.micro_batch or (pipelined_tokens(machines) if way in {"ours", "groups"} else WHOLE)

    @contextmanager
    def engine(self, way: str, machines: int, context: int, slots: int, **more: Any) -> Generator[dict[str, Any]]:
        """An engine that serves the model in that way; gives what it said of its load. `more`: further words for it."""
        lab, host = self.lab, self.lab.host
        layers = [float(count) for count in whole_layers(self._facts.layers, machines)]
        layers[-1] += 1
        words = {"context": context, "slots": slots, "micro_batch": self.micro_batch(way, machines), **more}
        addresses = lab.addresses[: machines - 1]
        serving = [host] if way == "pipelined" else []
        serving += lab.workers[: machines - 1] if way in {"stock", "pipelined"} else []
        here = f"127.0.0.1:{STOCK_PORT}"
        for server, address in zip(serving, [here, *addresses] if way == "pipelined" else addresses, strict=False):
            server.say("serve", address=address, cache=True)
        match way:
            case "solo":
                loaded = host.say("solo", **words)
            case "stock":
                loaded = host.say("stock", addresses=addresses, shares=layers[1:], **words)
            case "pipelined":
                loaded = host.say("stock", addresses=[here, *addresses], shares=layers, pipelined=True, **words)
            case _:
                nodes = lab.nodes[: machines - 1]
                groups = (self.arguments.groups or machines) if way == "groups" else 1
                words |= {"groups": groups, "wire": _OURS[way]}
                loaded = host.say("ours", workers=nodes, shares=layers[1:], push=True, **words)
        try:
            yield loaded
        finally:
            host.say("end")
            for server in serving:
                server.say("end_serving")


def whole_layers(layers: int, machines: int) -> list[int]:
    """How many layers each machine computes, the host first."""
    each, rest = divmod(layers, machines)
    return [each + (1 if place < rest else 0) for place in range(machines)]


def _pace(arguments: argparse.Namespace) -> Pace:
    return Pace(prompt=arguments.prompt_rate, answer=arguments.answer_rate, slow_motion=arguments.slow_motion)


@contextmanager
def opened(arguments: argparse.Namespace, scratch: Path) -> Generator[Runs]:
    """A lab of as many machines as are needed."""
    scratch.mkdir(parents=True, exist_ok=True)
    models = Path(arguments.models) if arguments.models else scratch / "models"
    models.mkdir(parents=True, exist_ok=True)
    name = arguments.model or ("stand-in" if arguments.stand_in else "long")
    model = cached_model(models, name)
    facts = read_facts([read_header(model)], model.stem)
    DigestStore(scratch / "digests").get(model)
    pace = _pace(arguments)

    def settings(file: Path) -> dict[str, str]:
        return pace.settings(facts, arguments.micro_batch or WHOLE, file)

    workers = max(arguments.machines) - 1
    stand_in = settings if arguments.stand_in else None
    with NetLab(workers + 1) as net:
        draft = cached_model(models, f"{name}-eagle3" if arguments.spec == "eagle3" else "small-draft")
        lab = Lab(net, scratch, model, draft, arguments.threads, workers, stand_in)
        yield Runs(arguments, lab, facts)
        lab.close()


class Cores:
    """How busy this machine's cores are."""

    def __init__(self) -> None:
        self._idle, self._all = _ticks()

    def busy(self) -> float:
        """The part since the last call, 0.0 to 1.0."""
        idle, total = _ticks()
        part = 1.0 - (idle - self._idle) / max(1, total - self._all)
        self._idle, self._all = idle, total
        return part


class Work:
    """CPU time that the lab's programs have taken, by what they do.

    Of a split on machines of their own, each takes its own part; a lab's cores take all of it. So the sum for a token,
    divided by the cores, is the least time that a lab needs for it.
    """

    def __init__(self) -> None:
        self._before = _work()

    def milliseconds(self) -> dict[str, float]:
        """Since the last call, by the names of `PROGRAMS`. Programs that ended meanwhile are not counted."""
        now = _work()
        found = dict.fromkeys(PROGRAMS, 0.0)
        for process, (name, ticks) in now.items():
            if name in found:
                found[name] += (ticks - self._before.get(process, ("", 0))[1]) * 1000.0 / os.sysconf("SC_CLK_TCK")
        self._before = now
        return found


PROGRAMS = {
    "engines": ("embedded.server_main", "bench.split.stock engine"),
    "rpc-servers": ("embedded.rpc_main", "bench.split.stock server"),
    "host's tunnels": ("bench.split.roles host",),
    "workers' tunnels": ("bench.split.roles worker",),
    "network": ("tests.netlab.switch",),
}
"""What runs in a lab, and words of its command line."""


def _work() -> dict[int, tuple[str, int]]:
    """The programs of this process's lab by their process ids: what they are, and their ticks of CPU time."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # Processes end meanwhile.
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
            ticks[int(stat.parent.name)] = int(fields[11]) + int(fields[12])
    found: dict[int, tuple[str, int]] = {}
    for process, taken in ticks.items():
        above = process
        while above not in {0, 1, os.getpid()}:
            above = parents.get(above, 0)
        if above == os.getpid():
            with suppress(OSError):
                command = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                name = next((name for name, words in PROGRAMS.items() if any(one in command for one in words)), "")
                found[process] = name, taken
    return found


def _ticks() -> tuple[int, int]:
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[3] + fields[4], sum(fields)


Measure = Callable[["Runs", str, int, float, int], list[Measured]]
"""Measures one way on so many machines at a delay, in one round; all sizes with one engine."""

Key = tuple[str, int, float, int]


def medians(results: list[Measured]) -> dict[Key, list[Measured]]:
    """Rounds of the same thing together, in the order in which they came first."""
    found: dict[Key, list[Measured]] = {}
    for result in results:
        found.setdefault((result.way, result.machines, result.delay_ms, result.size), []).append(result)
    return found


def middle(rounds: list[Measured], name: str) -> float:
    """The median of a value."""
    return median(one.values[name] for one in rounds)


def against(rounds: list[Measured], solo: list[Measured] | None, name: str) -> float | None:
    """The median of the rounds' ratios to one machine."""
    if not solo:
        return None
    return median(one.values[name] / alone.values[name] for one, alone in zip(rounds, solo, strict=False))


def load_text() -> str:
    """The machine's load, for people."""
    return f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"


def run(arguments: argparse.Namespace, measure: Measure, text: Callable[[list[Measured]], str]) -> int:
    """Measure all ways in turns, print the table, and keep the numbers; the exit status."""
    print(load_text())
    results: list[Measured] = []
    with tempfile.TemporaryDirectory(prefix="bench-split-") as scratch, opened(arguments, Path(scratch)) as runs:
        for delay in map(float, arguments.delays.split(",")):
            runs.distance(delay)
            for number in range(arguments.rounds):
                if "solo" in arguments.ways:
                    results += measure(runs, "solo", 1, delay, number)
                for machines in arguments.machines:
                    for way in arguments.ways:
                        if way != "solo":
                            results += measure(runs, way, machines, delay, number)
    print(text(results))
    if arguments.json:
        found = {"machine": machine(), "options": {name: str(value) for name, value in vars(arguments).items()}}
        arguments.json.write_text(json.dumps({**found, "results": [asdict(one) for one in results]}, indent=1))
    return 0
