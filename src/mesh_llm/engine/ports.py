"""Loopback ports for programs that cannot be asked for a free one."""

import socket
import sys
from types import TracebackType
from typing import Self

from mesh_llm.engine.spec import LOOPBACK


class ReservedPort:
    """A free loopback port, held until `release()` so that no other program is given it meanwhile.

    The socket is bound and does not listen: with SO_REUSEADDR on both sides, as ggml's RPC server has it, Linux lets
    the program that the port is for bind it as well. Elsewhere the port is let go at once.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((LOOPBACK, 0))
        self.number: int = self._socket.getsockname()[1]
        if not sys.platform.startswith("linux"):
            self._socket.close()

    def release(self) -> None:
        """Let go of the port. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
