"""The network between a lab's hosts: moves IP packets from TUN device to TUN device, when each link says so.

It is a process of its own (`python -m tests.netlab.switch`), so that a busy test cannot disturb the timing of its
network. The test holds the other end of a control socket; when that closes, orderly or because the test was killed,
the switch ends everything that still runs on the lab's hosts, and itself.
"""

import contextlib
import gc
import heapq
import json
import os
import select
import socket
import sys
import time
from collections.abc import Iterable
from typing import Any

from tests.netlab.link import Link, LinkCounters, LinkSettings
from tests.netlab.processes import kill_all

SUBNET = "10.77.0"
NETMASK = "255.255.255.0"
MAX_HOSTS = 64
MAX_CONTROL_BYTES = 64 * 1024

_SUBNET_BYTES = socket.inet_aton(f"{SUBNET}.0")[:3]
_LINK_LOCAL_GROUPS = socket.inet_aton("224.0.0.0")[:3]
_PACKETS_PER_TURN = 64
"""Read at most so many packets from one host before the others, and packets that are due, get their turn."""


def address_of(host: int) -> str:
    """The IPv4 address of host number `host`, counted from 0."""
    return f"{SUBNET}.{host + 1}"


class Switch:
    """Forwards packets among the hosts whose TUN descriptors it is given, until its control socket closes."""

    def __init__(self, control: socket.socket, devices: list[int], settings: LinkSettings, seed: int, mtu: int) -> None:
        self._control = control
        self._devices = devices
        self._mtu = mtu
        hosts = range(len(devices))
        self._links = {
            (source, target): Link(settings, f"{seed}:{source}:{target}")
            for source in hosts
            for target in hosts
            if source != target
        }
        self._due: list[tuple[float, int, int, Link, int, bytes]] = []
        self._sequence = 0

    def run(self) -> None:
        """Forward until the control socket closes."""
        hosts = {descriptor: host for host, descriptor in enumerate(self._devices)}
        control = self._control.fileno()
        # select, not epoll: its time-out has microseconds, and there are few descriptors.
        watched = [control, *self._devices]
        while True:
            self._deliver_due()
            timeout = max(0.0, self._due[0][0] - time.monotonic()) if self._due else None
            readable, _, _ = select.select(watched, [], [], timeout)
            for descriptor in readable:
                if descriptor != control:
                    self._take_in(hosts[descriptor])
                elif not self._answer():
                    return

    def _take_in(self, source: int) -> None:
        descriptor = self._devices[source]
        for _ in range(_PACKETS_PER_TURN):
            try:
                packet = os.read(descriptor, self._mtu)
            except BlockingIOError:
                return
            for target in _targets_of(packet, len(self._devices)):
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
    """Whether an IPv4 packet carries TCP."""
    return packet[0] >> 4 == 4 and packet[9] == socket.IPPROTO_TCP


def _targets_of(packet: bytes, hosts: int) -> Iterable[int]:
    """The numbers of the hosts that an IPv4 packet is for; none for anything else, which goes nowhere.

    Link-local multicast (224.0.0.0/24, where mDNS lives) is for all, as on any switch; other groups are for nobody.
    """
    if len(packet) < 20 or packet[0] >> 4 != 4:
        return ()
    if packet[16:19] == _LINK_LOCAL_GROUPS:
        return range(hosts)
    return (packet[19] - 1,) if packet[16:19] == _SUBNET_BYTES else ()


def main() -> None:
    """Entry point of the process: the only argument is the configuration that `NetLab` writes."""
    configuration: dict[str, Any] = json.loads(sys.argv[1])
    # The network must be faster than the hosts on it, which share these few cores. Needs the right to; fine without.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    gc.disable()
    # select() takes descriptors below 1024 only, and the test may have had more open than that.
    devices = [os.dup(descriptor) for descriptor in configuration["devices"]]
    control = socket.socket(fileno=os.dup(configuration["control"]))
    for descriptor in (*configuration["devices"], configuration["control"]):
        os.close(descriptor)
    try:
        settings = LinkSettings(**configuration["settings"])
        Switch(control, devices, settings, configuration["seed"], configuration["mtu"]).run()
    finally:
        kill_all(configuration["namespaces"])


if __name__ == "__main__":
    main()
