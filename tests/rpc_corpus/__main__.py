"""Record the corpus: `python -m tests.rpc_corpus [--only NAME,NAME] [--cases CASE]`, in a network without a route."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from tests.rpc_corpus import plan
from tests.rpc_corpus.driver import Case, Result
from tests.rpc_corpus.recorder import Recorder, Seen, steps
from tests.support.rpc_corpus import FOLDER, INDEX, Index, Recording, load, save

from mesh_llm.engine.sources.embedded import plugin
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.wire.ggml_rpc.protocol import Command

_CASE_SECONDS = 180
_START_SECONDS = 30
_FALL_SECONDS = 2
_COMPUTES = frozenset({Command.GRAPH_COMPUTE, Command.GRAPH_RECOMPUTE})
_QUIET = {**os.environ, "GGML_NO_BACKTRACE": "1"}


class Worker:
    """An rpc-server with a recorder before it; a new server where the last one fell."""

    def __init__(self, library: Path) -> None:
        self._library = library
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port: int = free.getsockname()[1]
        self._process = self._launch()
        self.recorder = Recorder(self._port)

    def _launch(self) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.rpc_corpus.server", str(self._library), str(self._port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=_QUIET,
        )  # fmt: skip
        pause = threading.Event()
        for _ in range(_START_SECONDS * 50):
            try:
                socket.create_connection(("127.0.0.1", self._port)).close()
            except ConnectionRefusedError:
                pause.wait(0.02)
            else:
                return process
        raise TimeoutError("the rpc-server does not listen")

    def fell(self, suspected: bool) -> str:
        """Why the server ended, where it did; a new one is there then. `suspected`: its client failed."""
        try:
            self._process.wait(_FALL_SECONDS if suspected else 0)
        except subprocess.TimeoutExpired:
            return ""
        said = self._process.stderr.read() if self._process.stderr else ""
        self._process = self._launch()
        return _last_words(said) or "without a word"

    def close(self) -> None:
        """End it."""
        self.recorder.close()
        self._process.kill()
        self._process.wait()


@dataclass
class Made:
    """What came of one architecture."""

    recordings: list[Recording] = field(default_factory=list[Recording])
    failed: dict[str, str] = field(default_factory=dict[str, str])


def record(architecture: str, library: Path, say: Callable[[str], None], only: Sequence[str] = ()) -> Made:
    """All cases of one architecture, or only those of some names."""
    made = Made()
    workers = [Worker(library), Worker(library)]
    try:
        for planned in plan.cases(architecture):
            if only and planned.name not in only:
                continue
            used = workers[: planned.workers]
            case = msgspec.structs.replace(
                planned.case,
                plugin=str(library),
                endpoints=tuple(f"127.0.0.1:{worker.recorder.port}" for worker in used),
            )
            why = _drive(case)
            fell = [said for worker in used if (said := worker.fell(bool(why)))]
            if fell:
                why = dict.fromkeys(why or ("after all",), f"the rpc-server fell: {fell[0]}")
            made.failed |= {f"{planned.name}/{context}": text for context, text in why.items()}
            for number, worker in enumerate(used, 1):
                place = "alone" if len(used) == 1 else f"worker-{number}"
                for seen in worker.recorder.take():
                    found = steps(_survived(seen) if fell else seen)
                    if any(step.command == Command.GRAPH_COMPUTE for step in found):
                        made.recordings.append(Recording(architecture, f"{planned.name}/{place}", "8.0.0", found))
            say(f"{architecture:18} {planned.name:16} {why or 'ok'}")
    finally:
        for worker in workers:
            worker.close()
    return made


def _survived(seen: list[Seen]) -> list[Seen]:
    """What came before the graph at which the rpc-server fell: the firewall is right to refuse that one.

    Requests are sent ahead. What came before the last answer was done; of the rest, any graph may be the one.
    """
    answered = max((at for at, one in enumerate(seen) if one.answer), default=0)
    suspect = next((at for at in range(answered, len(seen)) if seen[at].command in _COMPUTES), len(seen))
    return seen[:suspect]


def _completed(architecture: str, made: Made, old: Index | None, folder: Path, only: Sequence[str]) -> Made:
    """With what is kept of an earlier run, where only some cases were made again."""
    path = folder / f"{architecture}.xz"
    if not only or not path.exists() or old is None:
        return made
    kept = [one for one in load(path) if one.name.split("/")[0] not in only]
    failed = {key.split(":", 1)[1]: why for key, why in old.in_part.items() if key.split(":")[0] == architecture}
    failed = {key: why for key, why in failed.items() if key.split("/")[0] not in only}
    order = {planned.name: number for number, planned in enumerate(plan.cases(architecture))}
    recordings = sorted([*kept, *made.recordings], key=lambda one: order.get(one.name.split("/")[0], len(order)))
    return Made(recordings, failed | made.failed)


def _drive(case: Case) -> dict[str, str]:
    """Run one case; what failed by the context's name."""
    argv = [sys.executable, "-m", "tests.rpc_corpus.driver", msgspec.json.encode(case).decode()]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=_CASE_SECONDS, check=False, errors="replace", env=_QUIET
        )
    except subprocess.TimeoutExpired:
        return {"model": f"not done after {_CASE_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return msgspec.json.decode(lines[-1], type=Result).failed
    where = [line.removeprefix("context ") for line in lines if line.startswith("context ")]
    said = _last_words(done.stderr) or f"llama.cpp fell on the host, status {done.returncode}"
    return {where[-1] if where else "model": said}


def _last_words(text: str) -> str:
    """What an aborted process said: ggml's assertion, or its last line."""
    lines = [line for line in text.strip().splitlines() if line.strip() and not line.startswith("load_backend")]
    asserted = [line for line in lines if "GGML_ASSERT" in line or "terminate" in line or "what()" in line]
    said = (asserted or lines)[-1:]
    # Without the place in the builder's file system.
    return re.sub(r"(/\S*)?/(\S+:\d+: )", r"\2", said[0])[:300] if said else ""


def _merge(old: Index | None, results: dict[str, Made], names: list[str]) -> Index:
    recorded = set(old.recorded if old else ()) - set(results) | {
        name for name, made in results.items() if made.recordings
    }
    reasons = {name: "not recorded yet" for name in names if name not in recorded}
    if old:
        reasons |= {name: why for name, why in old.not_recorded.items() if name in reasons}
    reasons |= {
        name: "; ".join(sorted(set(made.failed.values()))) for name, made in results.items() if not made.recordings
    }
    reasons |= {name: why for name, why in plan.IMPOSSIBLE.items() if name not in recorded}
    in_part = {key: why for key, why in (old.in_part if old else {}).items() if key.split(":")[0] not in results}
    for name, made in results.items():
        if made.recordings:
            in_part |= {f"{name}:{key}": why for key, why in made.failed.items()}
    return Index(
        engine=VERSION,
        recorded=tuple(sorted(recorded)),
        not_recorded=dict(sorted(reasons.items())),
        in_part=dict(sorted(in_part.items())),
    )


def main() -> int:
    """Record what is asked for; prints a line for each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="architectures, with commas between them")
    parser.add_argument("--cases", help="names of cases in tests/rpc_corpus/plan.py; the others stay as they are")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as empty:
        built = plugin.find(Path(empty))
    if built is None:
        print("There is no RPC plugin: run `mesh-llm engine install` first.", file=sys.stderr)
        return 1
    listed = subprocess.run([sys.executable, "-m", "tests.rpc_corpus.names"], capture_output=True, check=True)
    names: list[str] = json.loads(listed.stdout)
    wanted = options.only.split(",") if options.only else [name for name in names if name not in plan.IMPOSSIBLE]
    path: Path = options.folder / INDEX.name
    old = msgspec.json.decode(path.read_bytes(), type=Index) if path.exists() else None
    cases: list[str] = options.cases.split(",") if options.cases else []
    results: dict[str, Made] = {}
    lock = threading.Lock()

    def one(name: str) -> None:
        made = record(name, built.path, lambda text: print(text, flush=True), cases)
        made = _completed(name, made, old, options.folder, cases)
        if made.recordings:
            size = save(name, made.recordings, options.folder)
            raw = sum(len(step.payload) for recording in made.recordings for step in recording.steps)
            print(f"{name:18} {size} bytes for {raw}", flush=True)

        with lock:
            results[name] = made
            found = _merge(old, results, names)
            path.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(one, wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
