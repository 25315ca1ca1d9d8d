"""A remote model against the local one: `python -m bench.mesh.http [--quick] [--rounds N] [--json FILE]`.

Node A serves `tiny`; two nodes on host B have nothing and ask A, one over QUIC and one over TLS. The same load goes
to A's own API (local) and to B's (quic, tls), in turn, round after round: time to first byte and chunk rate, at 1 to
64 streams, with 0 and 20 ms (one way) between the hosts. Three engines behind A: `tiny` in a real llama.cpp with real
nodes; and a stand-in that is never the bottleneck, at 50 events a second and stream, and as fast as its events are
taken. CPU time is that of everything on both hosts, the engine included. Needs root: hosts are network namespaces
(tests.netlab).
"""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol, TypeVar

import psutil
from bench.common import machine, table
from bench.mesh.http_load import Load, Numbers, link_round_trip, run
from tests.netlab.lab import NetLab, unavailable_reason
from tests.support.node import NodeProcess
from tests.support.pool import until, warm
from tests.support.process import Process

SERVING, ASKING = 0, 1
"""The lab's hosts."""
_PORT, _QUIC_PORT, _ENGINE_PORT, _ECHO_PORT = 9337, 9338, 8080, 8081
WAYS = {"local": (SERVING, _PORT), "quic": (ASKING, _QUIC_PORT), "tls": (ASKING, _PORT)}
"""Host and port of the API that each way asks."""
MESH = ("quic", "tls")
_RELAY_PORT = 9339
_BARE = {"tcp": (ASKING, _RELAY_PORT)}
"""To the stand-in by two bare relays over plain TCP, one on each host: what two processes on the way take at least."""
STREAMS = (1, 4, 16, 64)
DELAYS = (0.0, 20.0)
_CHAT: dict[str, Any] = {
    "model": "tiny",
    "temperature": 0,
    "messages": [{"role": "user", "content": "Hello"}],
}


@dataclass(frozen=True)
class Size:
    """How much is done.

    Attributes:
        rounds: how often each way has its turn.
        requests: for a first byte, of all streams together, though at least one each.
        tokens: for the engine's rate, of all streams together, though what fits and is worth timing of each.
        paced_events: of each stream, at its 50 a second.
        flat_out_events: of all streams together; answers that are eight times as long are measured, too.
    """

    rounds: int
    requests: int
    tokens: int
    paced_events: int
    flat_out_events: int


FULL = Size(rounds=5, requests=64, tokens=6144, paced_events=100, flat_out_events=8000)
QUICK = Size(rounds=3, requests=16, tokens=1536, paced_events=50, flat_out_events=4000)


def loads(engine: str, streams: int, size: Size) -> dict[str, Load]:
    """What is asked of an engine at so many streams: {load's name: load}."""

    def first(**body: Any) -> Load:
        return Load(streams, max(1, size.requests // streams), {**_CHAT, **body})

    def rate(**body: Any) -> Load:
        return Load(streams, 1, {**_CHAT, **body})

    if engine == "tiny":
        # `ignore_eos`: every answer is as long as it may be. Within the context, and longer than a few time slices.
        tokens = min(384, max(32, size.tokens // streams))
        return {
            "first byte": first(max_tokens=1),
            "chunk rate": rate(max_tokens=tokens, ignore_eos=True),
        }
    return {
        "first byte": first(events=1),
        "chunk rate at 50/s": rate(events=size.paced_events, rate=50),
        "chunk rate flat out": rate(events=size.flat_out_events // streams),
        "chunk rate flat out, long": rate(events=8 * size.flat_out_events // streams),
    }


@asynccontextmanager
async def real_nodes(lab: NetLab, directory: Path) -> AsyncGenerator[None]:
    """A serves `tiny`; on B are two clients of its mesh."""
    async with AsyncExitStack() as stack:
        slots = ("--parallel", str(max(STREAMS)), "--ctx-size", "512", "--no-draft")
        serving = await NodeProcess.start(directory / "a", models=["tiny"], arguments=slots, lab=lab, host=SERVING)
        stack.push_async_callback(serving.close)
        token = await serving.invite()
        for way in MESH:
            more = ("--transport", "quic" if way == "quic" else "auto", "--port", str(WAYS[way][1]))
            asking = await NodeProcess.start(
                directory / way, join=[token], client=True, arguments=more, lab=lab, host=ASKING
            )
            stack.push_async_callback(asking.close)
            await until(asking, warm("tiny"), "seeing tiny")
        yield


@asynccontextmanager
async def stand_in_nodes(lab: NetLab, directory: Path) -> AsyncGenerator[None]:  # noqa: ARG001 - one shape for both
    """The same two APIs and the same mesh, without daemons and llama.cpp around them."""
    async with AsyncExitStack() as stack:

        async def start(host: int, *words: str) -> Process:
            process = await Process.start([sys.executable, "-m", *words], lab=lab, host=host, name=words[0])
            stack.push_async_callback(process.close)
            return process

        engine = await start(SERVING, "bench.proxy.engine", str(_ENGINE_PORT))
        await engine.line("^ready")
        address = f"127.0.0.1:{_ENGINE_PORT}"
        serving = await start(SERVING, "bench.mesh.http_roles", "serve", address, str(_PORT))
        token = (await serving.line("^token (.*)$")).group(1)
        for way in MESH:
            asking = await start(ASKING, "bench.mesh.http_roles", "ask", str(WAYS[way][1]), token, way)
            await asking.line("^ready")
        relay = ("bench.mesh.tunnel_roles", "relay", str(_RELAY_PORT))
        await (await start(SERVING, *relay, "127.0.0.1", str(_ENGINE_PORT))).line("^ready")
        await (await start(ASKING, *relay, lab.addr(SERVING), str(_RELAY_PORT))).line("^ready")
        yield


@asynccontextmanager
async def echo_server(lab: NetLab) -> AsyncGenerator[None]:
    """Beside the serving node: what a round trip over the link takes by plain TCP."""
    words = [sys.executable, "-m", "bench.mesh.tunnel_roles", "server", str(_ECHO_PORT)]
    async with await Process.start(words, lab=lab, host=SERVING, name="echo") as process:
        await process.line("^ready")
        yield


ENGINES = {"tiny": real_nodes, "stand-in": stand_in_nodes}


Connection = TypeVar("Connection", bound=asyncio.Protocol)


class Connector(Protocol):
    """Opens a connection for a protocol."""

    def __call__(self, factory: Callable[[], Connection], /) -> Awaitable[Connection]:
        """Connect. Raises OSError."""
        ...


def connector(lab: NetLab, host: int, port: int, address: str = "127.0.0.1") -> Connector:
    """Opens connections from a host to an address; to its own API, as its user's programs do, where none is given."""

    async def connect(factory: Callable[[], Connection]) -> Connection:
        loop = asyncio.get_running_loop()
        connection = lab.socket(host)
        connection.setblocking(False)
        await loop.sock_connect(connection, (address, port))
        _, client = await loop.create_connection(factory, sock=connection)
        return client

    return connect


async def measure_engine(engine: str, size: Size, directory: Path, streams: list[int]) -> list[dict[str, Any]]:
    """All delays, streams, loads and rounds with one engine; one row for each cell."""
    rows: list[dict[str, Any]] = []
    async with NetLab(2) as lab, ENGINES[engine](lab, directory), echo_server(lab):
        link = connector(lab, ASKING, _ECHO_PORT, lab.addr(SERVING))
        places = WAYS | (_BARE if engine == "stand-in" else {})
        ways = {way: connector(lab, host, port) for way, (host, port) in places.items()}
        running = [psutil.Process(pid) for host in lab.hosts for pid in lab.processes(host)]
        for delay in DELAYS:
            lab.link(SERVING, ASKING).set(delay_ms=delay)
            # Connections, windows and round trip times find out about the new link before the clock starts.
            for connect in ways.values():
                for load in loads(engine, 4, QUICK).values():
                    await run(connect, load)
            for number in streams:
                for name, load in loads(engine, number, size).items():
                    seen = await in_turn(ways, link, load, size.rounds, running)
                    rows += [cell(engine, name, delay, number, seen, way) for way in ways if way != "local"]
                    print(".", end="", file=sys.stderr, flush=True)
    return rows


async def in_turn(
    ways: dict[str, Connector], link: Connector, load: Load, rounds: int, running: Iterable[psutil.Process]
) -> dict[str, list[Numbers]]:
    """Each way in each round, the first of a round being the last of the next: what drifts hits both alike.

    `link_ms` of all ways of a round is the link's own round trip, measured before them.
    """
    seen = {way: list[Numbers]() for way in ways}
    for number in range(rounds):
        link_ms = await link_round_trip(link, load)
        for way in list(ways) if number % 2 == 0 else list(reversed(ways)):
            before = _cpu_seconds(running)
            numbers = await run(ways[way], load)
            numbers["link_ms"] = link_ms
            numbers["cpu_us"] = (_cpu_seconds(running) - before) * 1e6 / numbers["events"]
            seen[way].append(numbers)
    return seen


def _cpu_seconds(running: Iterable[psutil.Process]) -> float:
    times = [process.cpu_times() for process in running]
    return sum(time.user + time.system for time in times)


def cell(
    engine: str, load: str, delay: float, streams: int, seen: dict[str, list[Numbers]], way: str
) -> dict[str, Any]:
    """A remote way beside the local one: medians over the rounds.

    Differences and ratios are of pairs measured one after the other, then the median.
    """
    key = "first_ms" if load == "first byte" else "events_per_s"
    local, remote = ([numbers[key] for numbers in seen[name]] for name in ("local", way))
    pairs = list(zip(local, remote, strict=True))
    row: dict[str, Any] = {
        "engine": engine,
        "load": load,
        "way": way,
        "delay_ms": delay,
        "streams": streams,
        "local": median(local),
        "remote": median(remote),
        # A rate is 0 where all of an answer was there at once: then there is no ratio to tell.
        "ratio": median(there / here for here, there in pairs) if all(local) else None,
        "local_cpu_us_per_event": median(numbers["cpu_us"] for numbers in seen["local"]),
        "remote_cpu_us_per_event": median(numbers["cpu_us"] for numbers in seen[way]),
        "lost": sum(int(numbers["lost"]) for name in ("local", way) for numbers in seen[name]),
    }
    if key == "first_ms":
        added = median(there - here for here, there in pairs)
        link = median(numbers["link_ms"] for numbers in seen[way])
        row |= {"added_ms": added, "added_beyond_round_trip_ms": added - 2 * delay}
        row |= {"link_ms": link, "added_beyond_link_ms": added - link}
    return row


def show(rows: list[dict[str, Any]]) -> str:
    """For people: first bytes, then rates."""
    firsts = [row for row in rows if "added_ms" in row]
    rates = [row for row in rows if "added_ms" not in row]
    columns = [
        "engine",
        "way",
        "delay_ms",
        "streams",
        "local",
        "remote",
        "added_ms",
        "added_beyond_round_trip_ms",
        "link_ms",
        "added_beyond_link_ms",
        "lost",
    ]
    heads = ["engine", "way", "delay ms", "streams", "local ms", "remote ms", "added ms", "beyond round trip"]
    heads += ["link ms", "beyond link", "lost"]
    rate_columns = ["engine", "load", "way", "delay_ms", "streams", "local", "remote", "ratio"]
    rate_columns += ["local_cpu_us_per_event", "remote_cpu_us_per_event", "lost"]
    rate_heads = ["engine", "load", "way", "delay ms", "streams", "local/s", "remote/s", "ratio"]
    rate_heads += ["local CPU us/chunk", "remote CPU us/chunk", "lost"]
    return "\n".join(
        [
            "Time to first byte",
            table(heads, [[row[column] for column in columns] for row in firsts]),
            "",
            "Chunks per second, all streams together",
            table(rate_heads, [[row[column] for column in rate_columns] for row in rates]),
        ]
    )


async def measure(engines: list[str], size: Size, streams: list[int]) -> list[dict[str, Any]]:
    """One engine after the other."""
    rows: list[dict[str, Any]] = []
    for engine in engines:
        with tempfile.TemporaryDirectory(prefix="bench-http-") as directory:
            rows += await measure_engine(engine, size, Path(directory), streams)
    print(file=sys.stderr)
    return rows


def main() -> None:
    """Entry point."""
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter answers")
    parser.add_argument("--rounds", type=int, help="how often each way has its turn")
    parser.add_argument("--engine", choices=list(ENGINES), action="append", help="only this one; repeatable")
    parser.add_argument("--streams", type=int, action="append", help="only so many streams; repeatable")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    if reason := unavailable_reason():
        parser.error(reason)
    size = QUICK if options.quick else FULL
    if options.rounds:
        size = Size(**{**vars(size), "rounds": options.rounds})
    before = machine()
    rows = uvloop.run(measure(options.engine or list(ENGINES), size, options.streams or list(STREAMS)))
    print(show(rows))
    if options.json:
        results = {"machine": before, "load_average_after": machine()["load_average_1_minute"], "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
