"""The network between a lab's hosts: moves IP packets from TUN device to TUN device, when each link says so.

It is a process of its own (`python -m tests.netlab.switch`), so that a busy test cannot disturb the timing of its
network. The test holds the other end of a control socket; when that closes, orderly or because the test was killed,
the switch ends everything that still runs on the lab's hosts, and itself.
"""

import contextlib
import gc
import heapq
import ipaddress
import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tests.netlab.link import Link, LinkCounters, LinkSettings
from tests.netlab.processes import kill_all

from mesh_llm.runtime.process import wake_promptly

IPV4, IPV6 = "ipv4", "ipv6"
"""The addresses of a network."""
MAX_HOSTS = 64
MAX_NETWORKS = 4
MAX_CONTROL_BYTES = 64 * 1024

_LINK_LOCAL_GROUPS = (bytes([224, 0, 0]), bytes([0xFF, 0x02]))
"""224.0.0.0/24 and ff02::/16."""
_PACKETS_PER_TURN = 64
"""Read at most so many packets from one host before the others, and packets that are due, get their turn."""


def subnet_of(network: int, family: str = IPV4) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """The addresses of network number `network`, counted from 0."""
    return ipaddress.ip_network(f"10.{77 + network}.0.0/24" if family == IPV4 else f"2001:db8:0:{network + 1}::/64")


def address_of(host: int, network: int = 0, family: str = IPV4) -> str:
    """The address of host number `host` on a network, both counted from 0."""
    return str(subnet_of(network, family)[host + 1])


class _Subnet(NamedTuple):
    first: int
    """The address of host 0 as a number."""
    ipv6: bool


class Switch:
    """Forwards packets among the hosts whose TUN descriptors it is given, until its control socket closes.

    Host `h` has the device `network * hosts + h` on each network. Links are between devices of one network.
    """

    def __init__(
        self,
        control: socket.socket,
        devices: list[int],
        networks: Sequence[str],
        settings: LinkSettings,
        seed: int,
        mtu: int,
    ) -> None:
        """`networks`: IPV4 or IPV6, each."""
        self._control = control
        self._devices = devices
        self._mtu = mtu
        self._hosts = len(devices) // len(networks)
        self._subnets = [_Subnet(int(subnet_of(*each)[1]), each[1] == IPV6) for each in enumerate(networks)]
        self._links = {
            (source, target): Link(settings, f"{seed}:{source}:{target}")
            for source in range(len(devices))
            for target in range(len(devices))
            if source != target and source // self._hosts == target // self._hosts
        }
        self._due: list[tuple[float, int, int, Link, int, bytes]] = []
        self._sequence = 0

    def run(self) -> None:
        """Forward until the control socket closes."""
        numbers = {descriptor: number for number, descriptor in enumerate(self._devices)}
        control = self._control.fileno()
        # select, not epoll: its time-out has microseconds, and there are few descriptors.
        watched = [control, *self._devices]
        while True:
            self._deliver_due()
            timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            readable, _, _ = select.select(watched, [], [], timeout)
            for descriptor in readable:
                if descriptor != control:
                    self._take_in(numbers[descriptor])
                elif not self._answer():
                    return

    def _take_in(self, source: int) -> None:
        descriptor = self._devices[source]
        for _ in range(_PACKETS_PER_TURN):
            try:
                packet = os.read(descriptor, self._mtu)
            except BlockingIOError:
                return
            network = source // self._hosts
            for host in _targets_of(packet, self._subnets[network], self._hosts):
                target = network * self._hosts + host
                link = self._links.get((source, target))
                if link is not None:
                    self._send(target, link, packet)

    def _send(self, target: int, link: Link, packet: bytes) -> None:
        if not link.settings.tcp and _is_tcp(packet):
            link.counters.cut_off += 1
            return
        now = time.monotonic()
        arrival = link.admit(now, len(packet))
        if arrival is None:
            return
        if arrival <= now:
            self._hand_over(target, link, link.era, packet)
        else:
            self._sequence += 1
            heapq.heappush(self._due, (arrival, self._sequence, target, link, link.era, packet))

    def _deliver_due(self) -> None:
        due = self._due
        now = time.monotonic()
        while due and due[0][0] <= now:
            _, _, target, link, era, packet = heapq.heappop(due)
            self._hand_over(target, link, era, packet)

    def _hand_over(self, target: int, link: Link, era: int, packet: bytes) -> None:
        if link.arrived(era, len(packet)):
            # The kernel refuses a packet that it finds malformed; a network would carry it, to be ignored there.
            with contextlib.suppress(OSError):
                os.write(self._devices[target], packet)

    def _answer(self) -> bool:
        """Do what the control socket asks; False when it has closed."""
        message = self._control.recv(MAX_CONTROL_BYTES)
        if not message:
            return False
        request: dict[str, Any] = json.loads(message)
        links = [self._links[source, target] for source, target in request["links"]]
        reply: dict[str, int] = {}
        match request["do"]:
            case "set":
                for link in links:
                    link.settings = link.settings.changed(request["values"])
            case "cut":
                for link in links:
                    link.cut()
            case "heal":
                for link in links:
                    link.heal()
            case "count":
                reply = sum((link.counters for link in links), LinkCounters()).as_dict()
            case other:
                raise ValueError(f"unknown control request {other!r}")
        self._control.send(json.dumps(reply).encode())
        return True


def _is_tcp(packet: bytes) -> bool:
    """Whether an IP packet carries TCP."""
    return packet[9 if packet[0] >> 4 == 4 else 6] == socket.IPPROTO_TCP


def _targets_of(packet: bytes, subnet: _Subnet, hosts: int) -> Iterable[int]:
    """The numbers of the hosts that an IP packet is for; none for anything else, which goes nowhere.

    Link-local multicast (where mDNS lives) is for all, as on any switch; other groups are for nobody. IPv6 goes nowhere
    on an IPv4 network, and the other way round.
    """
    if len(packet) < (40 if subnet.ipv6 else 20) or packet[0] >> 4 != (6 if subnet.ipv6 else 4):
        return ()
    target = packet[24:40] if subnet.ipv6 else packet[16:20]
    if target.startswith(_LINK_LOCAL_GROUPS):
        return range(hosts)
    host = int.from_bytes(target) - subnet.first
    return (host,) if 0 <= host < hosts else ()


def main() -> None:
    """Entry point of the process: the only argument is the configuration that `NetLab` writes."""
    configuration: dict[str, Any] = json.loads(sys.argv[1])
    # The network must be faster than the hosts on it, which share these few cores. Needs the right to; fine without.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    wake_promptly()
    gc.disable()
    # select() takes descriptors below 1024 only, and the test may have had more open than that.
    devices = [os.dup(descriptor) for descriptor in configuration["devices"]]
    control = socket.socket(fileno=os.dup(configuration["control"]))
    for descriptor in (*configuration["devices"], configuration["control"]):
        os.close(descriptor)
    try:
        settings = LinkSettings(**configuration["settings"])
        networks = configuration["networks"]
        Switch(control, devices, networks, settings, configuration["seed"], configuration["mtu"]).run()
    finally:
        kill_all(configuration["namespaces"])


if __name__ == "__main__":
    main()
