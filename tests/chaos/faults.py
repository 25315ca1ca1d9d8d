"""What can go wrong: each fault strikes one node, lasts for a while, and is undone; then the mesh must be whole."""

import asyncio
import contextlib
import errno
import os
import resource
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from tests.chaos.mesh import ENGINE, HOSTS, NODES, SHARED, ChaosMesh, processes_of

from mesh_llm.runtime.supervision import TaskScope

_RPC = "mesh_llm.engine.sources.embedded.rpc_main"
_DAY = 86_400
_CPU_GROUPS = Path("/sys/fs/cgroup/cpu")
"""Where a control group of version 1 with a CPU quota can be made."""
_BLOCK = b"\0" * 1_048_576


@dataclass(frozen=True)
class Fault:
    """One kind of fault.

    Attributes:
        name: in the table.
        strike: does it to a node while the block runs, and undoes it after; says whether there was something to break.
        closes_door: clients of the node itself cannot be answered, or not for long.
        nodes: those that it can strike.
        groups: it is for a split model with several engines, and the model is served all the time.
        blinds: the node cannot reach the others, so what its own clients ask of them ends in an error.
        blames: engines seem to have ended by what they were asked: such requests go to no second host.
    """

    name: str
    strike: Callable[[ChaosMesh, int], AbstractAsyncContextManager[None]]
    closes_door: bool = False
    blinds: bool = False
    blames: bool = False
    nodes: tuple[int, ...] = tuple(range(NODES))
    groups: bool = False


@asynccontextmanager
async def kill_daemon(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """kill -9 of the daemon: its engines must end by themselves. Started again afterwards, it rejoins."""
    node = mesh.nodes[number]
    await node.kill()
    await node.process.gone(20.0)
    try:
        yield
    finally:
        await node.restart()


@asynccontextmanager
async def power_cut(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """The daemon and all that it started, at once."""
    await mesh.nodes[number].crash()
    try:
        yield
    finally:
        await mesh.nodes[number].restart()


@asynccontextmanager
async def leave(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """A user stops the node with time to drain, and starts it again."""
    node = mesh.nodes[number]
    status, output = await node.cli("stop", "--drain", "20", timeout=60.0)
    assert status == 0, output
    assert await node.process.ended(40.0) == 0
    await node.process.gone()
    try:
        yield
    finally:
        await node.restart()


@asynccontextmanager
async def freeze(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """SIGSTOP to the daemon and all that it started, then SIGCONT."""
    mesh.nodes[number].freeze()
    try:
        yield
    finally:
        mesh.nodes[number].thaw()


@asynccontextmanager
async def network_cut(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """No packet to or from the node."""
    mesh.lab.isolate(number)
    try:
        yield
    finally:
        mesh.lab.rejoin(number)


@asynccontextmanager
async def tcp_block(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """A firewall drops TCP to and from the node, without a word; QUIC passes."""
    mesh.lab.links_of(number).block_tcp()
    try:
        yield
    finally:
        mesh.lab.links_of(number).allow_tcp()


def tcp_block_one_way(*, incoming: bool) -> Callable[[ChaosMesh, int], AbstractAsyncContextManager[None]]:
    """A firewall drops TCP to the node, or from it; the other direction and QUIC pass."""

    @asynccontextmanager
    async def strike(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
        others = [other for other in mesh.lab.hosts if other != number]
        links = [mesh.lab.one_way(*((other, number) if incoming else (number, other))) for other in others]
        for link in links:
            link.block_tcp()
        try:
            yield
        finally:
            for link in links:
                link.allow_tcp()

    return strike


@asynccontextmanager
async def tcp_flap(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """TCP to and from the node is dropped for a second and passes for a second, again and again; QUIC passes."""
    links = mesh.lab.links_of(number)

    async def flap() -> None:
        while True:
            links.block_tcp()
            await asyncio.sleep(1.0)
            links.allow_tcp()
            await asyncio.sleep(1.0)

    async with TaskScope("flap") as scope:
        flapping = scope.spawn(flap(), "flap")
        try:
            yield
        finally:
            flapping.cancel()
            links.allow_tcp()


@asynccontextmanager
async def packet_loss(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """30 % of the packets to and from the node are lost."""
    mesh.lab.links_of(number).set(loss=0.3)
    try:
        yield
    finally:
        mesh.lab.links_of(number).set(loss=0.0)


@asynccontextmanager
async def clock_forward(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """The wall clock jumps a day ahead, and back."""
    mesh.clocks.set(number, _DAY)
    try:
        yield
    finally:
        mesh.clocks.set(number, 0)


@asynccontextmanager
async def owners_hours(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """The machine's owner needs it, by the clock (`--yield`): its models are drained, and come back afterwards."""
    middle = mesh.owners_hour * 3600 + 1800
    mesh.clocks.set(number, middle - int(time.time()) % _DAY)
    try:
        yield
    finally:
        mesh.clocks.set(number, 0)


@asynccontextmanager
async def clock_back(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """The wall clock jumps a day back, and the node crashes and starts while it is wrong: an older life number."""
    mesh.clocks.set(number, -_DAY)
    try:
        await mesh.nodes[number].crash()
        await mesh.nodes[number].restart()
        yield
    finally:
        mesh.clocks.set(number, 0)


@asynccontextmanager
async def disk_full(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """Not a byte is left on the disk of the node's home."""
    path = mesh.home(number) / "filler"
    with path.open("wb", buffering=0) as file:
        _fill(file.fileno())
    try:
        yield
    finally:
        path.unlink()


@asynccontextmanager
async def output_gone(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """The reader of the node's output ends, for good: what the node says from then on is lost."""
    mesh.nodes[number].process.stop_reading()
    yield


@asynccontextmanager
async def log_disk_full(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """The disk is full to the last byte of the log's last block, and the log has something to take."""
    path = mesh.home(number) / "filler"
    with path.open("wb", buffering=0) as file:
        _fill(file.fileno())
    log = mesh.home(number) / "logs" / "daemon.log"
    with log.open("ab") as file:
        file.write(b"." * (-file.tell() % 4096))
    try:
        yield
    finally:
        path.unlink()


@asynccontextmanager
async def descriptors_used_up(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """The daemon may open no more than it has open, and two."""
    pid = mesh.nodes[number].process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (psutil.Process(pid).num_fds() + 2, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@asynccontextmanager
async def cpu_cut(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """All of the node gets a third of one CPU: by a control group where one may be made, else one CPU for all."""
    family = mesh.nodes[number].process.family()
    group = _CPU_GROUPS / f"mesh-llm-chaos-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("33000")
    except OSError:
        with contextlib.suppress(OSError):
            group.rmdir()
        group = None
    affinities = {process.pid: process.cpu_affinity() for process in family}
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if group is not None:
                (group / "cgroup.procs").write_text(str(process.pid))
            else:
                process.cpu_affinity([0])
    try:
        yield
    finally:
        # Also those that were started meanwhile.
        for process in mesh.nodes[number].process.family():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                if group is not None:
                    (_CPU_GROUPS / "cgroup.procs").write_text(str(process.pid))
                else:
                    process.cpu_affinity(affinities.get(process.pid, []))
        if group is not None:
            group.rmdir()


@asynccontextmanager
async def engine_crash(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """SIGABRT to every llama-server of the node, as if it had ended by itself: what was on it may have ended it."""
    for engine in processes_of(mesh.nodes[number], ENGINE):
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.send_signal(signal.SIGABRT)
    yield


@asynccontextmanager
async def engine_kill(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """SIGKILL to every llama-server of the node: it was killed from outside."""
    for engine in processes_of(mesh.nodes[number], ENGINE):
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.kill()
    yield


@asynccontextmanager
async def engine_freeze(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """SIGSTOP to every llama-server of the node: it takes connections and says nothing."""
    engines = processes_of(mesh.nodes[number], ENGINE)
    for engine in engines:
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.suspend()
    try:
        yield
    finally:
        # The node may have ended one of them meanwhile.
        for engine in engines:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.resume()


@asynccontextmanager
async def rpc_crash(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """SIGKILL to the rpc-server of the split model's worker, whichever of the two nodes that is."""
    del number
    for one in HOSTS[SHARED]:
        for server in processes_of(mesh.nodes[one], _RPC):
            with contextlib.suppress(psutil.NoSuchProcess):
                server.kill()
    yield


def one_engine_kill(place: int) -> Callable[[ChaosMesh, int], AbstractAsyncContextManager[None]]:
    """SIGKILL to one of the engines over the split model, whichever of the two nodes hosts it: the others go on.

    `place`: 0 is the one that brought the weights, unless it was replaced.
    """

    @asynccontextmanager
    async def strike(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
        del number
        for one in HOSTS[SHARED]:
            engines = processes_of(mesh.nodes[one], ENGINE)
            # A single one is what is left, and must go on.
            if len(engines) > 1:
                with contextlib.suppress(psutil.NoSuchProcess):
                    engines[place].kill()
        yield

    return strike


@asynccontextmanager
async def split_link_cut(mesh: ChaosMesh, number: int) -> AsyncGenerator[None]:
    """No packet between the split model's host and its worker. Both reach all others."""
    del number
    link = mesh.lab.link(*HOSTS[SHARED])
    link.cut()
    try:
        yield
    finally:
        link.heal()


FAULTS = (
    Fault("kill -9 of the daemon", kill_daemon, closes_door=True),
    Fault("power cut", power_cut, closes_door=True),
    Fault("stop with drain, start again", leave, closes_door=True),
    Fault("freeze (SIGSTOP of everything)", freeze, closes_door=True),
    Fault("network cut", network_cut, blinds=True),
    Fault("TCP blocked, QUIC passes", tcp_block),
    Fault("TCP to the node blocked, QUIC passes", tcp_block_one_way(incoming=True)),
    Fault("TCP from the node blocked, QUIC passes", tcp_block_one_way(incoming=False)),
    Fault("TCP blocked and free in turn, QUIC passes", tcp_flap),
    Fault("30 % packet loss", packet_loss),
    Fault("wall clock a day ahead, and back", clock_forward),
    Fault("the owner takes the machine (--yield)", owners_hours),
    Fault("crash and start with the clock a day behind", clock_back, closes_door=True),
    Fault("disk full", disk_full),
    Fault("llama-server killed", engine_kill),
    Fault("standard output gone", output_gone),
    Fault("the log's disk full to its last block", log_disk_full),
    Fault("descriptors used up", descriptors_used_up, closes_door=True),
    Fault("CPU quota cut to a third", cpu_cut),
    Fault("llama-server crash", engine_crash, blames=True),
    Fault("llama-server frozen", engine_freeze),
    Fault("rpc-server crash", rpc_crash, nodes=HOSTS[SHARED]),
    Fault("link between host and worker cut", split_link_cut, nodes=HOSTS[SHARED]),
    Fault("first of two engines of a split killed", one_engine_kill(0), nodes=HOSTS[SHARED], groups=True),
    Fault("second of two engines of a split killed", one_engine_kill(-1), nodes=HOSTS[SHARED], groups=True),
)


def _fill(descriptor: int) -> None:
    block = _BLOCK
    while block:
        try:
            os.write(descriptor, block)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            block = block[: len(block) // 2]
