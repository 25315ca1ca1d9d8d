"""Stands in for an RPC server that was taken over: `taken_over.py PORT KEY_FILE PARENT TCP_PORT ALLOWED`.

ALLOWED is JSON: the numbers of the system calls that may succeed. It listens as ggml's server does. Once it has
accepted, it tries what an attacker would, in the serving thread and in a thread that was there before, and prints a
line of JSON: what each attempt gave, as the name of the error or `done`.
"""

import ctypes
import errno
import json
import os
import resource
import socket
import sys
import threading
from pathlib import Path

PORT, SECRET, PARENT, TCP_PORT = int(sys.argv[1]), sys.argv[2].encode(), int(sys.argv[3]), int(sys.argv[4])
LIBC = ctypes.CDLL(None, use_errno=True)
ARM = os.uname().machine == "aarch64"
OUT, SCRATCH = os.dup(1), ctypes.create_string_buffer(4096)

# x86-64, AArch64
NUMBERS = {
    "openat": (257, 56), "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "execve": (59, 221),
    "clone": (56, 220), "clone3": (435, 435), "kill": (62, 129), "tgkill": (234, 131), "tkill": (200, 130),
    "mmap": (9, 222), "mprotect": (10, 226), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "io_uring_setup": (425, 425), "unlinkat": (263, 35), "memfd_create": (319, 279),
    "pidfd_open": (434, 434), "prctl": (157, 167), "prlimit64": (302, 261), "unshare": (272, 97),
    "renameat2": (316, 276), "mkdirat": (258, 34), "symlinkat": (266, 36), "fchmodat": (268, 53),
    "sched_setaffinity": (203, 122), "userfaultfd": (323, 282), "bpf": (321, 280), "perf_event_open": (298, 241),
    "shmget": (29, 194), "personality": (135, 92), "setuid": (105, 146), "mount": (165, 40),
}  # fmt: skip

AT_CWD = ctypes.c_long(-100)
READ, WRITE, EXECUTE, PRIVATE, ANONYMOUS = 1, 2, 4, 2, 0x20
UNFILTERED = () if ARM else (335, 336)
"""uretprobe and uprobe: the kernel asks no filter for them, and answers with SIGILL."""


def call(name: str, *arguments: object) -> int:
    """The system call itself, so that no library checks first."""
    LIBC.syscall.restype = ctypes.c_long
    number = NUMBERS[name][1 if ARM else 0]
    words = [ctypes.c_long(one) if isinstance(one, int) else one for one in arguments]
    return int(LIBC.syscall(ctypes.c_long(number), *words))


def outcome(name: str, *arguments: object) -> str:
    ctypes.set_errno(0)
    done = call(name, *arguments)
    return "done" if done >= 0 else errno.errorcode.get(ctypes.get_errno(), str(ctypes.get_errno()))


def attempts(page: int) -> dict[str, str]:
    argv = (ctypes.c_char_p * 2)(b"/bin/true", None)
    inet = b"\x02\x00" + TCP_PORT.to_bytes(2, "big") + b"\x7f\x00\x00\x01" + bytes(8)
    return {
        "read the node's key": outcome("openat", AT_CWD, SECRET, 0),
        "write to it": outcome("openat", AT_CWD, SECRET, 2),
        "make a file": outcome("openat", AT_CWD, SECRET + b".new", 0o101, 0o600),
        "remove it": outcome("unlinkat", AT_CWD, SECRET, 0),
        "rename it": outcome("renameat2", AT_CWD, SECRET, AT_CWD, SECRET + b".moved", 0),
        "make a directory": outcome("mkdirat", AT_CWD, SECRET + b".d", 0o700),
        "make a link": outcome("symlinkat", SECRET, AT_CWD, SECRET + b".l"),
        "change its mode": outcome("fchmodat", AT_CWD, SECRET, 0o666),
        "its own memory as a file": outcome("openat", AT_CWD, b"/proc/self/mem", 2),
        "its parent's environment": outcome("openat", AT_CWD, b"/proc/%d/environ" % PARENT, 0),
        "a socket": outcome("socket", 2, 1, 0),
        "a Unix socket": outcome("socket", 1, 1, 0),
        "connect": outcome("connect", 0, inet, 16),
        "bind": outcome("bind", 0, inet, 16),
        "a program": outcome("execve", argv[0], argv, None),
        "a process": outcome("clone", 17, 0, 0, 0, 0),
        "a process by clone3": outcome("clone3", SCRATCH, 64),
        "signal its parent": outcome("kill", PARENT, 0),
        "signal a thread of its parent": outcome("tgkill", PARENT, PARENT, 0),
        "signal a thread": outcome("tkill", PARENT, 0),
        "executable memory": outcome("mmap", 0, 4096, READ | EXECUTE, PRIVATE | ANONYMOUS, -1, 0),
        "writable and executable memory": outcome("mmap", 0, 4096, READ | WRITE | EXECUTE, PRIVATE | ANONYMOUS, -1, 0),
        "memory made executable": outcome("mprotect", page, 4096, READ | EXECUTE),
        "trace its parent": outcome("ptrace", 16, PARENT, 0, 0),
        "be traced": outcome("ptrace", 0, 0, 0, 0),
        "read its parent's memory": outcome("process_vm_readv", PARENT, SCRATCH, 1, SCRATCH, 1, 0),
        "write its parent's memory": outcome("process_vm_writev", PARENT, SCRATCH, 1, SCRATCH, 1, 0),
        "io_uring": outcome("io_uring_setup", 4, SCRATCH),
        "a file in memory": outcome("memfd_create", b"x", 0),
        "a handle of its parent": outcome("pidfd_open", PARENT, 0),
        "be dumpable": outcome("prctl", 4, 1, 0, 0, 0),
        "raise a limit": outcome("prlimit64", 0, 7, SCRATCH, None),
        "a namespace": outcome("unshare", 0x10000000),
        "move its parent to a processor": outcome("sched_setaffinity", PARENT, 8, SCRATCH),
        "userfaultfd": outcome("userfaultfd", 0),
        "bpf": outcome("bpf", 0, SCRATCH, 16),
        "perf": outcome("perf_event_open", SCRATCH, 0, -1, -1, 0),
        "shared memory": outcome("shmget", 0, 4096, 0o1600),
        "executable by personality": outcome("personality", 0x0400000),
        "another user": outcome("setuid", 65534),
        "mount": outcome("mount", b"none", b"/", b"tmpfs", 0, None),
    }


def everything_else(allowed: frozenset[int]) -> dict[int, str]:
    """Each system call there is that is not on the list, without arguments: what does not give EPERM."""
    found: dict[int, str] = {}
    for number in range(1024):
        if number in UNFILTERED:
            continue
        for numbered in (number, 0x40000000 | number):
            if numbered in allowed:
                continue
            ctypes.set_errno(0)
            LIBC.syscall(ctypes.c_long(numbered), *(ctypes.c_long(0),) * 6)
            if ctypes.get_errno() != errno.EPERM:
                found[numbered] = errno.errorcode.get(ctypes.get_errno(), "done")
    return found


def files() -> list[str]:
    """What its descriptors lead to."""
    found: list[str] = []
    for fd in range(64):
        try:
            found.append(str(Path(f"/proc/self/fd/{fd}").readlink()).partition(":")[0])
        except OSError:
            continue
    return found


def main() -> None:
    page = call("mmap", 0, 4096, READ | WRITE, PRIVATE | ANONYMOUS, -1, 0)
    go, early = threading.Event(), dict[str, str]()

    def other() -> None:
        go.wait()
        early.update(attempts(page))

    waiting = threading.Thread(target=other)
    waiting.start()
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", PORT))
    listener.listen(1)
    surroundings = {
        "environment": sorted(os.environ),
        "files": files(),
        "no_new_privs": call("prctl", 39, 0, 0, 0, 0),
        "core": resource.getrlimit(resource.RLIMIT_CORE)[1],
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    }
    allowed = frozenset(json.loads(sys.argv[5]))
    client, _ = listener.accept()
    go.set()
    waiting.join()
    after = threading.Thread(target=client.recv, args=(1,))
    after.start()
    after.join()
    answer = {
        "serving": attempts(page),
        "before": early,
        "rest": everything_else(allowed),
        "surroundings": surroundings,
    }
    os.write(OUT, json.dumps(answer).encode() + b"\n")
    client.send(b"x")
    os._exit(0)


main()
