"""What a node reports to the service manager that started it: ready, stopping, a status line, and signs of life.

The protocol is systemd's sd_notify(3): datagrams of `NAME=value` lines to the Unix socket that `NOTIFY_SOCKET` names.
Other service managers and some containers speak it too. Without the variable nothing is sent.
"""

import os
import socket
import time
from collections.abc import MutableMapping
from typing import Self

import structlog

_log = structlog.get_logger(__name__)

START_SECONDS = 900.0
"""Longest silence during a start: an approval on the local network may take ten minutes."""
_MOST_STATUS = 400


class Notifier:
    """Sends datagrams to the service manager. It never blocks and never raises: a node runs without a manager too."""

    def __init__(self, address: str = "", watchdog: float = 0.0) -> None:
        """`address`: of the socket; empty: send nothing. `watchdog`: see the attribute."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._failed = False
        self._status = ""
        self.watchdog = watchdog
        """Seconds after which the manager ends a silent node; 0: never."""

    @classmethod
    def from_environment(cls, environment: MutableMapping[str, str] = os.environ) -> Self:
        """Take the manager's variables out of the environment, so that engines do not inherit them."""
        address = environment.pop("NOTIFY_SOCKET", "")
        microseconds = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        meant = not pid or pid == str(os.getpid())
        watchdog = int(microseconds) / 1e6 if address and meant and microseconds.isdecimal() else 0.0
        return cls(address if address[:1] in {"/", "@"} else "", watchdog)

    @property
    def listening(self) -> bool:
        """Whether there is a service manager to report to."""
        return bool(self._address)

    def starting(self, text: str) -> None:
        """The start goes on: a step of it, and more time for the rest."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(START_SECONDS * 1e6)}", *self._changed(text))

    def ready(self) -> None:
        """The node answers; also after `reloading`."""
        self._send("READY=1")

    def reloading(self) -> None:
        """The settings are read again. `ready` must follow."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, seconds: float) -> None:
        """The node ends, which takes at most this long."""
        text = "stopping: answers under way may end"
        self._send("STOPPING=1", f"EXTEND_TIMEOUT_USEC={int(seconds * 1e6)}", *self._changed(text))

    def alive(self, text: str) -> None:
        """A sign of life for the watchdog, and what the node does."""
        self._send(*(["WATCHDOG=1"] if self.watchdog else []), *self._changed(text))

    def _changed(self, text: str) -> list[str]:
        """The line for a new status text; none for the last one again."""
        text = "".join(char if char.isprintable() else " " for char in text)[:_MOST_STATUS]
        if not text or text == self._status:
            return []
        self._status = text
        return [f"STATUS={text}"]

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode("utf-8", "replace"), self._address)
            self._failed = False
        except OSError as error:
            if not self._failed:
                self._failed = True
                _log.warning("the service manager cannot be told", reason=error.strerror or str(error))
