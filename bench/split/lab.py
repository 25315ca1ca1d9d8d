"""The lab of the split benchmark: one host and its workers as processes on hosts of their own, told what to do."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.split.stand_in import build
from tests.netlab.lab import NetLab

STOCK_PORT = 50052

StandIn = Callable[[Path], dict[str, str]]
"""The settings of a machine's stand-ins, by the file that all engines of the machine share."""


class Machine:
    """A role on a host of the lab. `say` waits for its answer."""

    def __init__(self, lab: NetLab, host: int, *arguments: str) -> None:
        argv = [sys.executable, "-m", "bench.split.roles", *arguments]
        self._process = lab.popen(host, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._read()

    def say(self, do: str, **words: Any) -> dict[str, Any]:
        """Command and answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **words}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a machine of the lab ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SystemExit(f"an engine of the lab ended: {answer['error']}")
        return answer


class Lab:
    """All of them, in one mesh, and the links between them."""

    def __init__(
        self,
        net: NetLab,
        scratch: Path,
        model: Path,
        draft: Path,
        threads: int,
        workers: int,
        stand_in: StandIn | None = None,
    ) -> None:
        """`stand_in`: all engines are stand-ins; None: they compute."""
        self.net = net
        common = (str(model), str(draft), str(threads))
        self.host = Machine(net, 0, "host", str(scratch / "host"), *common)
        self.workers: list[Machine] = []
        for number in range(1, workers + 1):
            token = self.host.facts["token"]
            self.workers.append(Machine(net, number, "worker", token, str(scratch / f"worker{number}"), *common))
        met = [(worker.facts["node"], worker.facts["addresses"]) for worker in self.workers]
        for worker in self.workers:
            worker.say("meet", others=met)
        if stand_in is not None:
            for number, machine in enumerate((self.host, *self.workers)):
                settings = stand_in(scratch / f"machine{number}")
                machine.say("stand_in", library=str(build(scratch)), settings=settings)
        self.addresses = [f"{net.addr(number)}:{STOCK_PORT}" for number in range(1, workers + 1)]

    @property
    def nodes(self) -> list[str]:
        """The workers' node ids."""
        return [worker.facts["node"] for worker in self.workers]

    def delay(self, milliseconds: float, megabits: float = 0.0) -> None:
        """One way, on all links; and their rate each way in Mbit/s, 0.0 for no limit."""
        self.net.all_links().set(delay_ms=milliseconds)
        if megabits:
            self.net.all_links().set(rate_mbps=megabits)

    @property
    def wire_bytes(self) -> int:
        """What passed all links so far, headers of IP and above included."""
        return self.net.all_links().counters().bytes

    def stock_servers(self, *, cache: bool) -> None:
        """Start llama.cpp's own, on the lab's network."""
        for worker, address in zip(self.workers, self.addresses, strict=True):
            worker.say("serve", address=address, cache=cache)

    def end_stock_servers(self) -> None:
        """Stop them."""
        for worker in self.workers:
            worker.say("end_serving")

    def close(self) -> None:
        """End all."""
        for machine in (self.host, *self.workers):
            machine.close()
