"""A model on one machine, split by llama.cpp's own RPC, and split by mesh-llm, over links of several lengths.

    python -m bench.split [--model half-gigabyte|middle|small] [--workers 2] [--delays 0,5,10,20,30] [--json FILE]

All in one run on one machine, so that what is compared has met the same noise: real llama.cpp, real QUIC, hosts that
are network namespaces with links between them. All ways take turns in `--passes` passes over each delay; in each they
are asked `--rounds` times, and medians count (bench.split.report). Engines run on one thread: all hosts share this
machine's cores. The machine's speed is probed right before each way that is predicted, since it changes: what is judged
is the prediction, not how the machine was some minutes ago. Needs root, and a network namespace (`make bench`).
"""

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from bench.common import RESULTS
from bench.split.lab import Lab
from bench.split.report import WAYS, Result, bars, joined, plot, text
from tests.netlab.lab import NetLab
from tests.support.gguf_models import cached_model

from mesh_llm.core.performance.prediction import Link, solo_seconds, split_seconds
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import ModelFacts, Speed, SplitLayout, SplitShare
from mesh_llm.engine.speed import measure_speed
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.models.tensor_cache.digests import DigestStore

_HOST = NodeId("0" * 64)


class Bench:
    """One run."""

    def __init__(self, arguments: argparse.Namespace, lab: Lab, facts: ModelFacts) -> None:
        self.arguments = arguments
        self._lab = lab
        self._facts = facts
        self._expected = ""
        self._stock_trips: tuple[int, float] | None = None
        self.cold_bytes = 0
        # The host computes a part as well, as in use: its layers first, then the workers'.
        each, rest = divmod(facts.layers, arguments.workers + 1)
        self._layers = [each + (1 if place < rest else 0) for place in range(arguments.workers + 1)]
        shares = [float(count) for count in self._layers[1:]]
        shares[-1] += 1
        self._shares = shares

    def solo(self, delay: float) -> Result:
        """Undivided; its text is what all others are compared with."""
        loaded = self._lab.host.say("solo")
        seconds = solo_seconds(self._facts, self._speed())
        result = self._measure("solo", delay, loaded)
        self._lab.host.say("end")
        result.predicted_ms = None if seconds is None else round(seconds * 1e3, 2)
        return result

    def fill_cache(self) -> None:
        """A stock load into empty caches, which stay for the others; and what it asks and says is counted."""
        lab = self._lab
        lab.stock_servers(cache=True)
        before = lab.wire_bytes
        lab.host.say("stock", addresses=lab.addresses, shares=self._shares)
        self.cold_bytes = lab.wire_bytes - before
        lab.host.say("end")
        lab.host.say("stock", addresses=lab.addresses, shares=self._shares, count=True)
        loaded = lab.host.say("stats")["round_trips"]
        lab.host.say("ask", tokens=8)
        before_ask = lab.host.say("stats")["round_trips"]
        lab.host.say("ask", tokens=24)
        self._stock_trips = (loaded, round((lab.host.say("stats")["round_trips"] - before_ask) / 24, 2))
        lab.host.say("end")
        lab.end_stock_servers()

    def stock(self, delay: float) -> Result:
        """llama.cpp's RPC over TCP, its cache warm."""
        lab = self._lab
        lab.stock_servers(cache=True)
        before = lab.wire_bytes
        loaded = lab.host.say("stock", addresses=lab.addresses, shares=self._shares)
        load_bytes = lab.wire_bytes - before
        result = self._measure("stock", delay, loaded)
        lab.host.say("end")
        lab.end_stock_servers()
        result.load_bytes = load_bytes
        if self._stock_trips is not None:
            result.load_round_trips, result.round_trips_per_token = self._stock_trips
        return result

    def ours(self, way: str, delay: float) -> Result:
        """Through the tunnel."""
        lab = self._lab
        before = lab.wire_bytes
        options: dict[str, Any] = {"shares": self._shares, "push": way != "relayed", "draft": way == "pushed+draft"}
        loaded = lab.host.say("ours", workers=lab.nodes, **options)
        loaded["load_s"] += loaded["open_s"]
        load_bytes, load_trips = lab.wire_bytes - before, lab.host.say("stats")["round_trips"]
        predicted = self._predict(self._links()) if way == "pushed" else None
        result = self._measure(way, delay, loaded)
        lab.host.say("end")
        result.load_bytes, result.load_round_trips = load_bytes, load_trips
        result.predicted_ms = predicted
        return result

    def _speed(self) -> Speed | None:
        """This machine's at present, with the threads that the lab's engines have; None where these are only some."""
        measured = asyncio.run(measure_speed(("CPU",)))
        if measured is None or self.arguments.threads >= measured.cores:
            return measured
        return msgspec.structs.replace(measured, cores=1, full=measured.one) if self.arguments.threads == 1 else None

    def _links(self) -> dict[str, Link]:
        return {node: msgspec.convert(self._lab.host.say("link", node=node), Link) for node in self._lab.nodes}

    def _predict(self, links: dict[str, Link]) -> float | None:
        nodes = [_HOST, *map(NodeId, self._lab.nodes)]
        shares = tuple(SplitShare(node=node, layers=n) for node, n in zip(nodes, self._layers, strict=True))
        ways = {(_HOST, NodeId(node)): link for node, link in links.items()}
        # Among themselves the workers are as far apart: the lab's links are alike.
        middle = Link(
            one_way_seconds=sum(link.one_way_seconds for link in links.values()) / len(links),
            bytes_per_second=min(link.bytes_per_second for link in links.values()),
        )
        ways |= {(one, other): middle for one in nodes[1:] for other in nodes[1:] if one < other}
        speed = self._speed()
        if speed is None:
            return None
        layout = SplitLayout(term=1, shares=shares)
        seconds = split_seconds(self._facts, layout, dict.fromkeys(nodes, speed), ways)
        return None if seconds is None else round(seconds.total() * 1e3, 2)

    def _measure(self, way: str, delay: float, loaded: dict[str, Any]) -> Result:
        host, tokens, rounds = self._lab.host, self.arguments.tokens, self.arguments.rounds
        host.say("ask", tokens=tokens)
        counted = way not in {"solo", "stock"}
        trips = host.say("stats")["round_trips"] if counted else 0
        before = self._lab.wire_bytes
        answers = [host.say("ask", tokens=tokens) for _ in range(rounds)]
        passed = self._lab.wire_bytes - before
        said = {answer["text"] for answer in answers}
        if way == "solo" and not self._expected:
            self._expected = answers[0]["text"]
        return Result(
            way,
            delay,
            0.0 if way == "solo" else delay * (self.arguments.workers + 1),
            round(median(answer["ms_per_token"] for answer in answers), 2),
            round(loaded["load_s"], 2),
            bytes_per_token=0.0 if way == "solo" else passed / (tokens * rounds),
            round_trips_per_token=round((host.say("stats")["round_trips"] - trips) / (tokens * rounds), 2)
            if counted
            else None,
            same_tokens=said == {self._expected},
        )


def one_pass(bench: Bench, ways: list[str], delay: float) -> list[Result]:
    """Every way once, next to each other."""
    results: list[Result] = []
    for way in ways:
        match way:
            case "solo":
                results.append(bench.solo(delay))
            case "stock":
                results.append(bench.stock(delay))
            case _:
                results.append(bench.ours(way, delay))
        print(f"  {delay:g} ms, {WAYS[way]}: {results[-1].ms_per_token:.1f} ms/token", file=sys.stderr, flush=True)
    return results


def run(arguments: argparse.Namespace, scratch: Path) -> tuple[list[Result], int]:
    """All ways over all delays; and the bytes of a stock load without a cache."""
    models = Path(arguments.models) if arguments.models else scratch / "models"
    models.mkdir(parents=True, exist_ok=True)
    model, draft = cached_model(models, arguments.model), cached_model(models, "small-draft")
    facts = read_facts([read_header(model)], model.stem)
    # All hosts have the same disk: its digests are computed once, before the clock starts.
    DigestStore(scratch / "digests").get(model)
    results: list[Result] = []
    with NetLab(arguments.workers + 1) as net:
        lab = Lab(net, scratch, model, draft, arguments.threads, arguments.workers)
        bench = Bench(arguments, lab, facts)
        if "stock" in arguments.ways:
            bench.fill_cache()
        for delay in map(float, arguments.delays.split(",")):
            lab.delay(delay)
            passes = [one_pass(bench, arguments.ways, delay) for _ in range(arguments.passes)]
            results += [joined(of_way) for of_way in zip(*passes, strict=True)]
        lab.close()
    return results, bench.cold_bytes


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="half-gigabyte")
    parser.add_argument("--models", help="directory that keeps generated models")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--delays", default="0,5,10,20,30", help="one way, ms")
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda words: words.split(","))
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="where the plot goes; beside the numbers by default")
    arguments = parser.parse_args()
    if arguments.ways[:1] != ["solo"]:
        parser.error("--ways begins with solo: everything is compared with that")
    with tempfile.TemporaryDirectory(prefix="bench-split-") as scratch:
        results, cold = run(arguments, Path(scratch))
    print(text(results))
    print(f"\nA stock load without a cache: {cold:,} bytes on the wire.")
    judged = bars(results, cold, large=arguments.model == "half-gigabyte")
    print("\n".join(judged))
    numbers = {"model": arguments.model, "workers": arguments.workers, "stock_cold_load_bytes": cold, "bars": judged}
    written = json.dumps({**numbers, "results": [asdict(result) for result in results]}, indent=1)
    if arguments.json:
        arguments.json.write_text(written)
    target = arguments.plot or (arguments.json.with_suffix(".svg") if arguments.json else RESULTS / "split.svg")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(plot(results, f"{arguments.model} model, one host and {arguments.workers} workers"))
    print(f"Plot: {target}")
    return 0 if all(result.same_tokens for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
