"""NetLab: N hosts with their own addresses on one machine, and the links between them under the test's control.

    with NetLab(3, delay_ms=20) as lab:
        server = lab.popen(0, ["python3", "-m", "http.server", "--bind", lab.addr(0)])
        lab.link(0, 1).set(delay_ms=50, loss=0.01, rate_mbps=100)
        lab.link(0, 1).cut()
        lab.isolate(2)

`async with` works too. A host has 127.0.0.1 and 10.77.0.x, no route to anywhere else, and no name.
`networks=("ipv4", "ipv6")` gives it an interface and an address on each of two networks, here 10.77.0.x and
2001:db8:0:2::x; what is done to links is done on all networks, unless one is named. All delays and rates are per
direction: a link with `delay_ms=20` has a round trip of 40 ms. The hosts share the machine's files and processes, so a
node needs a home directory and a data directory of its own, but may use any port.
"""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from tests.netlab.link import LinkCounters, LinkSettings
from tests.netlab.namespaces import TUN_DEVICE, Namespace, open_tun
from tests.netlab.processes import kill_all, processes_in
from tests.netlab.switch import IPV4, IPV6, MAX_CONTROL_BYTES, MAX_HOSTS, MAX_NETWORKS, address_of, subnet_of

T = TypeVar("T")

_ROOT = Path(__file__).resolve().parents[2]
_BYTES_PER_MEGABIT = 125_000
_DEVICE_QUEUE_PACKETS = 5_000
_CONTROL_TIMEOUT = 30.0
_CLOSE_TIMEOUT = 30.0


def unavailable_reason() -> str | None:
    """Why this machine cannot run a lab, or None when it can."""
    if sys.platform != "linux":
        return "netlab needs Linux (network namespaces)"
    if os.geteuid() != 0:
        return "netlab needs root, or a user namespace: unshare -rn"
    if not os.access(TUN_DEVICE, os.R_OK | os.W_OK):
        return f"netlab needs {TUN_DEVICE}, which is missing or not ours to open"
    return None


@dataclass(frozen=True, slots=True)
class LinkControl:
    """The way to change one or more directions of links, all at once. Changes hold when the call returns."""

    _lab: "NetLab"
    _directions: tuple[tuple[int, int], ...]

    def set(
        self,
        *,
        delay_ms: float | None = None,
        jitter_ms: float | None = None,
        loss: float | None = None,
        rate_mbps: float | None = None,
        queue_bytes: int | None = None,
    ) -> None:
        """Change what is given and leave the rest; units: milliseconds one way, probability, megabits per second."""
        values = _settings_values(delay_ms, jitter_ms, loss, rate_mbps, queue_bytes)
        LinkSettings().changed(values)  # raises here, in the test, what would end the switch there
        self._lab.ask("set", self._directions, values)

    def unlimited(self) -> None:
        """Take the rate limit off."""
        self._lab.ask("set", self._directions, {"rate": None})

    def block_tcp(self) -> None:
        """Drop TCP packets from now on, without a word, as a firewall does."""
        self._lab.ask("set", self._directions, {"tcp": False})

    def allow_tcp(self) -> None:
        """Undo `block_tcp`."""
        self._lab.ask("set", self._directions, {"tcp": True})

    def cut(self) -> None:
        """Lose every packet from now on, those under way included. Nobody is told, as with a pulled cable."""
        self._lab.ask("cut", self._directions)

    def heal(self) -> None:
        """Undo `cut`."""
        self._lab.ask("heal", self._directions)

    def counters(self) -> LinkCounters:
        """What passed and what was dropped since the lab began, summed over these directions."""
        return LinkCounters(**self._lab.ask("count", self._directions))


class NetLab:
    """See the module's text. Not started before `open()` or `with`."""

    def __init__(
        self,
        hosts: int,
        *,
        delay_ms: float = 0.0,
        jitter_ms: float = 0.0,
        loss: float = 0.0,
        rate_mbps: float | None = None,
        queue_bytes: int | None = None,
        seed: int = 1,
        mtu: int = 1500,
        networks: Sequence[str] = (IPV4,),
    ) -> None:
        """A lab of `hosts` hosts whose links all start with these settings; see `LinkControl.set` for units.

        `networks`: "ipv4" or "ipv6", each; every host is on all of them.
        """
        if not 1 <= hosts <= MAX_HOSTS:
            raise ValueError(f"a lab has 1 to {MAX_HOSTS} hosts, not {hosts}")
        if not 1 <= len(networks) <= MAX_NETWORKS or not {IPV4, IPV6}.issuperset(networks):
            raise ValueError(f"a lab has 1 to {MAX_NETWORKS} networks, each ipv4 or ipv6, not {networks}")
        self.hosts = range(hosts)
        self.networks = tuple(networks)
        self._settings = LinkSettings(**_settings_values(delay_ms, jitter_ms, loss, rate_mbps, queue_bytes))  # type: ignore[arg-type]
        self._seed = seed
        self._mtu = mtu
        self._namespaces: list[Namespace] = []
        self._switch: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._control_lock = threading.Lock()

    # Life

    def open(self) -> None:
        """Make the hosts and start the network. Raises OSError where `unavailable_reason` has something to say."""
        devices: list[int] = []
        try:
            self._namespaces.extend(Namespace() for _ in self.hosts)
            for network in range(len(self.networks)):
                for host, namespace in enumerate(self._namespaces):
                    devices.append(namespace.call(lambda host=host, network=network: self._open_device(host, network)))
            self._start_switch(devices)
        except BaseException:
            self.close()
            raise
        finally:
            for device in devices:
                os.close(device)

    def close(self) -> None:
        """End every process on the hosts, then the network. Doing it twice is allowed."""
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._switch is not None:
            try:
                self._switch.wait(_CLOSE_TIMEOUT)
            except subprocess.TimeoutExpired:
                self._switch.kill()
                self._switch.wait()
            self._switch = None
        # Normally the switch has done so already; it may itself have been killed.
        kill_all(self._inodes())
        for namespace in self._namespaces:
            namespace.close()
        self._namespaces.clear()

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.close)

    # Links

    def link(self, one: int, other: int, network: int | None = None) -> LinkControl:
        """Both directions between two hosts."""
        return self._links([(one, other), (other, one)], network)

    def one_way(self, source: int, target: int) -> LinkControl:
        """Only the direction from `source` to `target`."""
        return self._links([(source, target)])

    def all_links(self) -> LinkControl:
        """Every direction of every link."""
        return self._links((a, b) for a in self.hosts for b in self.hosts if a != b)

    def links_of(self, host: int) -> LinkControl:
        """Both directions of every link of one host."""
        return self._links(pair for other in self.hosts if other != host for pair in ((host, other), (other, host)))

    def isolate(self, host: int) -> None:
        """Cut a host off from all others; `rejoin` undoes it."""
        self.links_of(host).cut()

    def rejoin(self, host: int) -> None:
        """Heal all links of a host."""
        self.links_of(host).heal()

    def partition(self, *groups: Iterable[int]) -> None:
        """Cut every link between hosts of different groups; links inside a group stay as they are."""
        sets = [set(group) for group in groups]
        self._links(
            (a, b) for mine in sets for theirs in sets if mine is not theirs for a in mine for b in theirs
        ).cut()

    def heal(self) -> None:
        """Heal every link."""
        self.all_links().heal()

    # Hosts

    def addr(self, host: int, network: int = 0) -> str:
        """The address of a host on one of the lab's networks."""
        self._check_host(host)
        return address_of(host, network, self.networks[network])

    def call(self, host: int, function: Callable[[], T]) -> T:
        """Run `function` in a thread on a host: the sockets it makes belong there, and work from anywhere after.

        A blocking client library can be used this way; its connections to 127.0.0.1 reach the host's own ports.
        """
        self._check_host(host)
        return self._namespaces[host].call(function)

    def socket(self, host: int, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket on a host, for use from the test."""
        return self.call(host, lambda: socket.socket(family, kind))

    async def connect(
        self, host: int, port: int, address: str = "127.0.0.1", *, limit: int = 1024 * 1024
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Open a TCP connection from a host, by default to the host itself: most services listen on loopback only."""
        connection = self.socket(host)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, (address, port))
        except BaseException:
            connection.close()
            raise
        return await asyncio.open_connection(sock=connection, limit=limit)

    def popen(self, host: int, argv: Sequence[str | os.PathLike[str]], **options: Any) -> "subprocess.Popen[Any]":
        """`subprocess.Popen` on a host. Whatever still runs when the lab closes is killed."""

        def start() -> "subprocess.Popen[Any]":
            return subprocess.Popen(list(argv), **options)

        return self.call(host, start)

    def run(
        self, host: int, argv: Sequence[str | os.PathLike[str]], *, check: bool = False, **options: Any
    ) -> "subprocess.CompletedProcess[Any]":
        """`subprocess.run` on a host."""

        def run() -> "subprocess.CompletedProcess[Any]":
            return subprocess.run(list(argv), check=check, **options)

        return self.call(host, run)

    def command(self, host: int, argv: Sequence[str | os.PathLike[str]]) -> list[str]:
        """The command line that runs `argv` on a host, under the same pid: for what starts processes by itself.

        Uses nsenter (util-linux), and works as long as the lab is open and this process lives.
        """
        self._check_host(host)
        return ["nsenter", f"--net={self._namespaces[host].path}", "--", *(os.fspath(word) for word in argv)]

    def processes(self, host: int) -> set[int]:
        """Pids of all that runs on a host, children in namespaces of their own included; zombies are not counted."""
        self._check_host(host)
        return processes_in([self._namespaces[host].inode])

    def crash(self, host: int) -> int:
        """SIGKILL everything on a host, as a power cut would; returns how many processes that was."""
        self._check_host(host)
        return kill_all([self._namespaces[host].inode])

    # Inside

    def ask(
        self, do: str, links: Sequence[tuple[int, int]], values: dict[str, float | None] | None = None
    ) -> dict[str, int]:
        """Send one request to the switch and wait until it is done. For `LinkControl`."""
        with self._control_lock:
            if self._control is None:
                raise RuntimeError("the lab is not open")
            self._control.send(json.dumps({"do": do, "links": links, "values": values or {}}).encode())
            reply = self._control.recv(MAX_CONTROL_BYTES)
        if not reply:
            raise RuntimeError("the lab's switch has ended; its traceback is on stderr")
        return json.loads(reply)

    def _open_device(self, host: int, network: int) -> int:
        prefix = subnet_of(network, self.networks[network]).prefixlen
        address = self.addr(host, network)
        return open_tun(f"lan{network}", address, prefix, mtu=self._mtu, queue_packets=_DEVICE_QUEUE_PACKETS)

    def _start_switch(self, devices: list[int]) -> None:
        # SEQPACKET keeps message boundaries, and still says when the other end is gone.
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(_CONTROL_TIMEOUT)
        self._control = ours
        configuration = {
            "control": theirs.fileno(),
            "devices": devices,
            "networks": self.networks,
            "namespaces": sorted(self._inodes()),
            "settings": asdict(self._settings),
            "seed": self._seed,
            "mtu": self._mtu,
        }
        with theirs:
            self._switch = subprocess.Popen(
                [sys.executable, "-m", "tests.netlab.switch", json.dumps(configuration)],
                cwd=_ROOT,
                stdin=subprocess.DEVNULL,
                pass_fds=[*devices, theirs.fileno()],
                # Ctrl-C ends the test; the switch must outlive it, to clean up.
                start_new_session=True,
            )
        self.ask("count", [])  # answered when it is forwarding

    def _links(self, directions: Iterable[tuple[int, int]], network: int | None = None) -> LinkControl:
        """`network`: None means all."""
        chosen = tuple(directions)
        for source, target in chosen:
            self._check_host(source)
            self._check_host(target)
            if source == target:
                raise ValueError(f"host {source} has no link to itself")
        networks = range(len(self.networks)) if network is None else (network,)
        first = [each * len(self.hosts) for each in networks]
        return LinkControl(self, tuple((number + a, number + b) for number in first for a, b in chosen))

    def _check_host(self, host: int) -> None:
        if host not in self.hosts:
            raise ValueError(f"there is no host {host} in a lab of {len(self.hosts)}")

    def _inodes(self) -> list[int]:
        return [namespace.inode for namespace in self._namespaces]


def _settings_values(
    delay_ms: float | None,
    jitter_ms: float | None,
    loss: float | None,
    rate_mbps: float | None,
    queue_bytes: int | None,
) -> dict[str, float | None]:
    """The fields of `LinkSettings`, in its units, for those that are given."""
    values = {
        "delay": None if delay_ms is None else delay_ms / 1000,
        "jitter": None if jitter_ms is None else jitter_ms / 1000,
        "loss": loss,
        "rate": None if rate_mbps is None else rate_mbps * _BYTES_PER_MEGABIT,
        "queue_bytes": queue_bytes,
    }
    return {name: value for name, value in values.items() if value is not None}
