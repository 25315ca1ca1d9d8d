"""The five nodes: two models on two nodes each, a third split over two, and each node's home on a small disk."""

import asyncio
import ctypes
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from tests.chaos.clock import Clocks
from tests.netlab.lab import NetLab
from tests.support.gguf_models import cached_model
from tests.support.node import NodeProcess
from tests.support.pool import until, warm

SOLO = ("red", "blue")
SHARED = "green"
MODELS = (*SOLO, SHARED)
HOSTS = {"red": (0, 1), "blue": (1, 2), "green": (3, 4)}
"""By model, the lab's hosts that serve it."""
NODES = 5
DISK_BYTES = 48_000_000
_SIZES = ("--ctx-size", "1024", "--parallel", "2", "--no-draft")
ENGINE = "mesh_llm.engine.sources.embedded.server_main"
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000


def own_mounts() -> None:
    """Give this process mounts of its own, so that small disks can be had; before it has a second thread."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "no mounts of its own")


def _small_disk(path: Path) -> None:
    path.mkdir(parents=True)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={DISK_BYTES},mode=700".encode()
    if libc.mount(b"chaos", os.fsencode(path), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), f"no small disk at {path}")


class ChaosMesh:
    """The lab and its nodes.

    `journals`: each node records its decisions, outside of its small disk. `groups`: engines over the split model.
    """

    def __init__(self, directory: Path, *, journals: bool = False, groups: int = 1) -> None:
        self.directory = directory
        self.lab = NetLab(NODES, delay_ms=1)
        self.clocks = Clocks(directory / "clocks")
        self.nodes: list[NodeProcess] = []
        self.ids: list[str] = []
        self._journals = journals
        self._groups = groups
        # Half a day from now, so that no node yields by itself during a run.
        self.owners_hour = (int(time.time()) // 3600 + 12) % 24

    async def start(self) -> None:
        """Start everything; returns when every node sees all models and all nodes."""
        models = self._models()
        await asyncio.to_thread(self.lab.open)
        for number in range(NODES):
            await asyncio.to_thread(_small_disk, self.home(number))
        await self._start(0, models=[models["red"]], join=[])
        token = await _split_invite(self.nodes[0])
        await self._start(1, models=[models["red"], models["blue"]], join=[token])
        await self._start(2, models=[models["blue"]], join=[token])
        await self._start(3, models=[models["green"]], join=[token], shares=True)
        await self._start(4, models=[models["green"]], join=[token], shares=True)
        await self.settled(180.0)
        self.ids = [(await node.status())["node_id"] for node in self.nodes]

    async def close(self) -> None:
        """Kill what is left, and let go of the disks and the network."""
        for node in self.nodes:
            await node.close()
        await asyncio.to_thread(self.lab.close)
        libc = ctypes.CDLL(None, use_errno=True)
        for number in range(NODES):
            libc.umount2(os.fsencode(self.home(number)), 2)

    def home(self, number: int) -> Path:
        """A node's MESH_LLM_HOME: a disk of its own."""
        return self.directory / f"node{number}"

    def journal(self, number: int) -> Path:
        """Where a node's decisions are recorded, if they are."""
        return self.directory / f"journal{number}"

    async def settled(self, timeout: float) -> float:
        """Wait until everybody sees everybody and everything that is served; the seconds it took."""
        began = time.monotonic()
        await self.load_second_models(timeout)
        await asyncio.gather(*(until(node, _complete, "seeing all", timeout) for node in self.nodes))
        hosts = [self.nodes[number] for number in HOSTS[SHARED]]

        def all_engines(_status: Mapping[str, Any]) -> bool:
            return max(len(processes_of(node, ENGINE)) for node in hosts) == self._groups

        await until(hosts[0], all_engines, f"{self._groups} engines over the split model", timeout)
        return time.monotonic() - began

    def role(self, number: int) -> str:
        """What a node holds goes by this: either of the split model's two is host or worker, each other has its own."""
        if number not in HOSTS[SHARED]:
            return f"node{number}"
        hosts = bool(processes_of(self.nodes[number], ENGINE))
        return f"{'host' if hosts else 'worker'} of {SHARED}"

    async def load_second_models(self, timeout: float) -> None:
        """Node 1 serves two models; it takes up only the first by itself when it starts."""
        node = self.nodes[1]
        await until(node, lambda status: _here(status, "red") == "warm", "serving red", timeout)
        if _here(await node.status(), "blue") not in {"warm", "loading"}:
            await node.console.post("/api/load", {"model": "blue"})

    async def _start(self, number: int, *, models: Sequence[Path], join: Sequence[str], shares: bool = False) -> None:
        hours = f"{self.owners_hour:02}:00-{self.owners_hour:02}:59"
        # Without models on demand: who serves what is what the judge goes by.
        arguments = [*_SIZES, "--name", f"node{number}", "--yield", hours, "--on-demand", "off"]
        if shares:
            arguments += ["--split", "--groups", str(self._groups)]
        if self._journals:
            arguments += ["--journal", str(self.journal(number))]
        node = await NodeProcess.start(
            self.home(number),
            models=models,
            join=join,
            arguments=arguments,
            env={**self.clocks.environment(number), "TZ": "UTC"},
            models_dir=models[0].parent,
            lab=self.lab,
            host=number,
        )
        self.nodes.append(node)

    def _models(self) -> Mapping[str, Path]:
        cache = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d" / "models"
        cache.mkdir(parents=True, exist_ok=True)
        small = cached_model(cache, "small")
        places = {"red": "solo", "blue": "solo", "green": "shared"}
        found: dict[str, Path] = {}
        for name, place in places.items():
            path = self.directory / "models" / place / f"{name}.gguf"
            path.parent.mkdir(parents=True, exist_ok=True)
            found[name] = Path(shutil.copy(small, path))
        return found


def processes_of(node: NodeProcess, module: str) -> list[psutil.Process]:
    """The processes of a node that run a module, oldest first."""
    found: list[psutil.Process] = []
    for process in node.process.family():
        try:
            words = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        # The guard has the module among its words too, until it has become the engine.
        if module in words and "guard.py" not in " ".join(words[:5]):
            found.append(process)
    return sorted(found, key=_age)


def _age(process: psutil.Process) -> float:
    # Of a process that has ended the time may be unknown, and does not matter.
    try:
        return process.create_time()
    except psutil.NoSuchProcess:
        return 0.0


def _complete(status: Mapping[str, Any]) -> bool:
    served = all(warm(model, len(HOSTS[model]))(dict(status)) for model in SOLO)
    return served and warm(SHARED)(dict(status)) and _split_whole(status) and _all_alive(status)


def _all_alive(status: Mapping[str, Any]) -> bool:
    return [peer["state"] for peer in status["peers"]] == ["alive"] * (NODES - 1)


def _split_whole(status: Mapping[str, Any]) -> bool:
    split = status["split"]
    return split is not None and len(split["workers"]) == 1


def _here(status: Mapping[str, Any], model: str) -> str:
    own = (one["status"] for one in status["models"] if one["name"] == model and one["here"])
    return next(own, "")


async def _split_invite(node: NodeProcess) -> str:
    status, output = await node.cli("invite", "create", "--scope", "split", "--json")
    assert status == 0, output
    return json.loads(output)["token"]
