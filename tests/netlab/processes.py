"""Which processes live in a lab's namespaces, and how to end every one of them."""

import contextlib
import os
import select
import signal
from collections.abc import Collection
from pathlib import Path


def processes_in(namespaces: Collection[int]) -> set[int]:
    """Pids of the living processes inside network namespaces (given by inode), with all their descendants.

    Descendants count too: a process may put its children into a namespace of their own. Zombies are not alive.
    """
    parents: dict[int, int] = {}
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        # A process may end between two reads: then it is simply not there.
        with contextlib.suppress(OSError):
            pid = int(entry.name)
            if (entry / "ns" / "net").stat().st_ino in namespaces:
                found.add(pid)
            # The command name is in parentheses and may hold anything; the parent is the second field after it.
            parents[pid] = int((entry / "stat").read_text(errors="replace").rpartition(")")[2].split()[1])
    grew = True
    while grew:
        more = {pid for pid, parent in parents.items() if parent in found and pid not in found}
        found |= more
        grew = bool(more)
    return {pid for pid in found if _alive(pid)}


def kill_all(namespaces: Collection[int]) -> int:
    """SIGKILL every process that `processes_in` finds, until there is none; return how many there were."""
    killed = 0
    while pids := processes_in(namespaces):
        for pid in pids:
            killed += _kill_and_wait(pid)
    return killed


def _kill_and_wait(pid: int) -> int:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return 0
    try:
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll(10_000)
    except ProcessLookupError:
        return 0
    finally:
        os.close(descriptor)
    return 1


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}
