"""TCP through the mesh against plain TCP: `python -m bench.mesh.tunnel [--quick] [--passes N] [--json FILE]`.

Four ways from a client on one host to a server on another: straight TCP; the same two-process proxy with TCP in the
middle; and the mesh, TCP to QUIC to TCP and TCP to TLS to TCP. Bulk in one direction, and round trips of 64 bytes and
16 KiB. All ways take turns, pass after pass; medians count, and for what is compared the medians of the passes' ratios,
since a machine's speed changes from minute to minute. Hosts are network namespaces (tests.netlab): `here` is one host
with two nodes, the others two hosts with a link. Needs root.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.netlab.lab import NetLab

SERVER, RELAY, TCP_ENTRY, QUIC_ENTRY, TLS_ENTRY = 7001, 7002, 7003, 7004, 7005
WAYS = {"tcp": SERVER, "tcp proxy": TCP_ENTRY, "quic": QUIC_ENTRY, "tls": TLS_ENTRY}
ROLES = [sys.executable, "-m", "bench.mesh.tunnel_roles"]

LABELS = {"64": "64B", "16384": "16KiB"}
Numbers = dict[str, dict[str, float]]
"""Of each way: its numbers by their names."""


@dataclass(frozen=True)
class Scene:
    """Where it runs. `delay_ms` is one way; None: one host, and no network between."""

    name: str
    delay_ms: float | None
    megabytes: int
    rounds: int


def scenes(*, quick: bool) -> list[Scene]:
    """What is measured, in order."""
    scale = 4 if quick else 1
    return [
        Scene("here", None, 256 // scale, 2000 // scale),
        Scene("0 ms", 0.0, 128 // scale, 1000 // scale),
        Scene("10 ms", 10.0, 64 // scale, 100 // scale),
    ]


def measure(scene: Scene, passes: int) -> list[Numbers]:
    """All ways and loads of one scene, as often."""
    hosts = 1 if scene.delay_ms is None else 2
    far = hosts - 1
    with NetLab(hosts, delay_ms=scene.delay_ms or 0.0) as lab:
        server = lab.addr(far)

        def start(host: int, *role: str) -> str:
            process = lab.popen(host, [*ROLES, *role], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(("ready", "token ")):
                    return line.strip()
            raise RuntimeError(f"{role[0]} did not start")

        def load(port: int, kind: str, count: int) -> dict[str, float]:
            host = server if port == SERVER else "127.0.0.1"
            process = lab.popen(
                0, [*ROLES, "load", host, str(port), kind, str(count)], stdout=subprocess.PIPE, text=True
            )
            output, _ = process.communicate(timeout=300)
            return json.loads(output)

        start(far, "server", str(SERVER))
        start(far, "relay", str(RELAY), "127.0.0.1", str(SERVER))
        start(0, "relay", str(TCP_ENTRY), server, str(RELAY))
        token = start(far, "exit", "127.0.0.1", str(SERVER)).split()[1]
        start(0, "entry", str(QUIC_ENTRY), token, "quic")
        start(0, "entry", str(TLS_ENTRY), token, "tls")
        results: list[Numbers] = [{way: {} for way in WAYS} for _ in range(passes)]
        for numbers in results:
            for way, port in WAYS.items():
                numbers[way]["bulk_MB_s"] = load(port, "bulk", scene.megabytes)["megabytes_per_second"]
            for size in ("64", "16384"):
                for way, port in WAYS.items():
                    found = load(port, f"rtt{size}", scene.rounds)
                    numbers[way] |= {f"rtt_{LABELS[size]}_{key}": value for key, value in found.items()}
        return results


def middle(passes: list[Numbers], way: str, name: str, against: str = "") -> float:
    """The median of a way's number; or of its ratios to the same number of another way."""
    return median(numbers[way][name] / (numbers[against][name] if against else 1) for numbers in passes)


def table(results: dict[str, list[Numbers]]) -> str:
    """For people."""
    columns = ["bulk_MB_s", "rtt_64B_p50_ms", "rtt_64B_p99_ms", "rtt_16KiB_p50_ms", "rtt_16KiB_p99_ms"]
    lines = [f"{'scene':8}{'way':12}" + "".join(f"{column:>18}" for column in columns)]
    for scene, passes in results.items():
        lines += [
            f"{scene:8}{way:12}" + "".join(f"{middle(passes, way, column):18.2f}" for column in columns) for way in WAYS
        ]
        for way in ("quic", "tls"):
            share = middle(passes, way, "bulk_MB_s", "tcp proxy")
            times = middle(passes, way, "rtt_64B_p50_ms", "tcp proxy")
            lines.append(f"{'':8}{way}: {share:.2f} of the TCP proxy's bulk, {times:.2f} of its 64-byte round trip")
    return "\n".join(lines)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a quarter of the work")
    parser.add_argument("--passes", type=int, default=5, help="how often each way has its turn")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    results = {
        scene.name: measure(scene, 1 if options.quick else options.passes) for scene in scenes(quick=options.quick)
    }
    print(table(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
