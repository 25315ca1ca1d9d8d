"""Network namespaces without names: each lives exactly as long as a descriptor, or a process inside, holds it.

That is why there is nothing to clean up after a crash and nothing that could clash: no /run/netns, no mount, no
interface in the machine's own namespace. Interfaces are set up by ioctl (netdevice(7), and the kernel's
Documentation/networking/tuntap.rst), so iproute2 need not be installed.
"""

import contextlib
import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

TUN_DEVICE = Path("/dev/net/tun")

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8916, 0x891C, 0x8922, 0x8943
_TUNSETIFF = 0x400454CA
_IFF_UP = 0x1
_IFF_TUN, _IFF_NO_PI = 0x1, 0x1000

_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """One network namespace, with its loopback interface up and no other."""

    def __init__(self) -> None:
        """Create it. Raises OSError (EPERM without the right to)."""
        self._descriptor = _in_new_thread(_enter_fresh_namespace)
        self.inode = os.fstat(self._descriptor).st_ino
        """Equals the inode of /proc/PID/ns/net of the processes inside."""

    @property
    def path(self) -> str:
        """A file that stands for the namespace as long as this object is open and this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def call(self, function: Callable[[], T]) -> T:
        """Run `function` in a thread that is inside the namespace: its sockets and child processes are there too.

        Sockets stay in the namespace where they were made, so one may be made here and used anywhere.
        """

        def inside() -> T:
            _check(_libc.setns(self._descriptor, _CLONE_NEWNET), "setns")
            return function()

        return _in_new_thread(inside)

    def close(self) -> None:
        """Let go of the namespace: it ends with the last process inside. Doing it twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def open_tun(name: str, address: str, prefix: int, *, mtu: int, queue_packets: int) -> int:
    """Make a TUN device in this thread's namespace, up and with one address; its other end is the descriptor.

    `prefix`: bits of the address that its network has in common.

    The device ends with the descriptor. Raises OSError.
    """
    descriptor = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFMTU, struct.pack("16si20x", name.encode(), mtu))
            # Only the machine's own root may do this; in a user namespace the kernel's default must do (500).
            with contextlib.suppress(PermissionError):
                queue = struct.pack("16si20x", name.encode(), queue_packets)
                fcntl.ioctl(control, _SIOCSIFTXQLEN, queue)
        _set_address(name, ipaddress.ip_interface(f"{address}/{prefix}"))
        _bring_up(name)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _enter_fresh_namespace() -> int:
    """Move this thread into a new namespace and return a descriptor of it."""
    _check(_libc.unshare(_CLONE_NEWNET), "unshare")
    _bring_up("lo")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _bring_up(interface: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH22x", interface.encode(), 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", interface.encode(), flags | _IFF_UP))


def _set_address(device: str, address: ipaddress.IPv4Interface | ipaddress.IPv6Interface) -> None:
    if isinstance(address, ipaddress.IPv6Interface):
        # struct in6_ifreq (linux/ipv6.h).
        request = struct.pack("16sIi", address.packed, address.network.prefixlen, socket.if_nametoindex(device))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as control:
            fcntl.ioctl(control, _SIOCSIFADDR, request)
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        for request, value in ((_SIOCSIFADDR, address.ip), (_SIOCSIFNETMASK, address.netmask)):
            fcntl.ioctl(control, request, struct.pack("16s24s", device.encode(), _socket_address(str(value))))


def _socket_address(address: str) -> bytes:
    """A `struct sockaddr_in` in the 24 bytes of an ifreq's union."""
    return struct.pack("HH4s16x", socket.AF_INET, 0, socket.inet_aton(address))


def _in_new_thread(function: Callable[[], T]) -> T:
    """Run `function` in a thread of its own and give back its result or its exception.

    A namespace is a property of a thread: the thread is thrown away, so that no other code ever runs in the wrong one.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(function())
        except BaseException as failure:  # noqa: BLE001 - carried over to the calling thread, whatever it is
            failures.append(failure)

    thread = threading.Thread(target=body, name="netlab")
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
