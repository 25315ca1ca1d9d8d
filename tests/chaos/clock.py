"""Wall clocks that jump: a small library, loaded into each node and what it starts, adds an offset to the time of day.

The kernel has no time namespace for the wall clock, and the machine's own must be left alone. Only what asks the C
library for the time of day sees the jump (Python, iroh's Rust, llama.cpp do); monotonic clocks are as they were, as
when a person or NTP sets the clock.
"""

import struct
import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("clock.c")


class Clocks:
    """One clock for each node, in files of `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._library = directory / "clock.so"

    def environment(self, number: int) -> dict[str, str]:
        """What a node with this clock must be started with."""
        self._build()
        self.set(number, 0)
        return {"LD_PRELOAD": str(self._library), "CHAOS_CLOCK": str(self._file(number))}

    def set(self, number: int, seconds: int) -> None:
        """Let a node's clock be so much ahead of the real one from now on; negative: behind."""
        path = self._file(number)
        if not path.exists():
            path.write_bytes(struct.pack("=q", seconds))
            return
        with path.open("r+b") as file:
            file.write(struct.pack("=q", seconds))

    def _file(self, number: int) -> Path:
        return self._directory / f"clock{number}"

    def _build(self) -> None:
        if not self._library.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(self._library), str(_SOURCE), "-ldl"]
            subprocess.run(command, check=True)
