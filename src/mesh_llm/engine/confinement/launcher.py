"""Starts an RPC server that confines itself. A script of its own: standard library only, started with `-I -S`.

    python -I -S launcher.py --library FILE --listen PATH [--kind cpu|gpu|software] [--read PATH]... [--keep PATH]...
        -- PROGRAM ARGUMENTS...

It prepares the limits that the preloaded library (rpc_sockets.c) puts in force before the server reads its first byte.
Then the program takes its place (same pid). Without `--kind` the server gets its Unix socket and is not confined.

The limits are an allow-list; every other call fails with EPERM. `cpu`: memory that is not executable, threads, clocks,
its own descriptors, exit. `gpu`: also what a driver needs: read files below each `--read`, use device files, and map
code from those files. `software`: also memory that is executable, which Mesa's llvmpipe compiles into, a processor that
its driver shows as a GPU; only where the user asks for that device. Directories below a `--keep` stay closed, even
inside of one that is read. See seccomp(2) and landlock(7).
"""

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from dataclasses import dataclass

LISTEN, FILTER, RULES = "MESH_LLM_RPC_LISTEN", "MESH_LLM_RPC_FILTER", "MESH_LLM_RPC_LANDLOCK"
PRELOAD = "DYLD_INSERT_LIBRARIES" if sys.platform == "darwin" else "LD_PRELOAD"
CONNECT = "MESH_LLM_RPC_CONNECT"

CPU, GPU, SOFTWARE = "cpu", "gpu", "software"

_OPEN_FILES = 256
_NO_NEW_PRIVS = 38

# System calls by name: (x86-64, AArch64); None if the processor's table has no such call.
Numbers = tuple[int | None, int | None]

CPU_CALLS: dict[str, Numbers] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "close": (3, 57),
    "recvfrom": (45, 207), "sendto": (44, 206), "accept": (43, 202), "accept4": (288, 242), "shutdown": (48, 210),
    "poll": (7, None), "ppoll": (271, 73), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233),
    "brk": (12, 214), "futex": (202, 98), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getcpu": (309, 168), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "getrandom": (318, 278),
    "sysinfo": (99, 179), "getpid": (39, 172), "gettid": (186, 178), "set_tid_address": (218, 96),
    "set_robust_list": (273, 99), "rseq": (334, 293), "membarrier": (324, 283), "restart_syscall": (219, 128),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "exit": (60, 93), "exit_group": (231, 94),
}  # fmt: skip

GPU_CALLS: dict[str, Numbers] = {
    # Landlock decides which files; device files need ioctl and mmap.
    "open": (2, None), "openat": (257, 56), "stat": (4, None), "lstat": (6, None), "fstat": (5, 80),
    "newfstatat": (262, 79), "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, None), "readlinkat": (267, 78),
    "getcwd": (79, 17), "getdents64": (217, 61), "pread64": (17, 67), "lseek": (8, 62), "ioctl": (16, 29),
    "fcntl": (72, 25), "dup": (32, 23), "pipe": (22, None), "pipe2": (293, 59), "eventfd2": (290, 19),
    "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None), "epoll_pwait": (281, 22),
    "select": (23, None), "pselect6": (270, 72), "msync": (26, 227), "mlock": (149, 228), "munlock": (150, 229),
    "mbind": (237, 235), "get_mempolicy": (239, 236), "set_mempolicy": (238, 237), "uname": (63, 160),
    "getuid": (102, 174), "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177),
    "getppid": (110, 173), "getrlimit": (97, 163), "sched_getscheduler": (145, 120), "sched_getparam": (143, 121),
    "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126), "times": (100, 153),
}  # fmt: skip

CHECKED_CALLS: dict[str, Numbers] = {
    # Allowed depending on their arguments.
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "clone": (56, 220),
    "clone3": (435, 435),
    "tgkill": (234, 131),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
}

# By name of the processor: index into the pairs above, and the kernel's audit number.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4
_OTHER_ABI = 0x40000000
_CLONE_THREAD = 0x00010000
_WRITABLE, _EXECUTABLE = 2, 4
_ANONYMOUS = 0x20
_SET_NAME = 15


def _step(code: int, operand: int, yes: int = 0, no: int = 0) -> bytes:
    """An instruction of the kernel's classic BPF: u16 code, u8 jump if true, u8 jump if false, u32 operand."""
    return struct.pack("=HBBI", code, yes, no, operand)


_YES = _step(_RETURN, _ALLOW)
_NO = _step(_RETURN, _ERRNO | errno.EPERM)


def _argument(index: int, *, high: bool = False) -> bytes:
    """Load half of an argument; both machines are little-endian."""
    return _step(_LOAD, 16 + 8 * index + 4 * high)


def _only(number: int, body: bytes) -> bytes:
    """Run `body` for this system call only. Every path in it must end in a return."""
    return _step(_EQUAL, number, no=len(body) // 8) + body


def filter_program(kind: str, pid: int, machine: str | None = None) -> bytes:
    """The seccomp filter of a process: struct sock_filter[], as bytes.

    Args:
        kind: `cpu`, `gpu` or `software`.
        pid: of the process: it may signal itself, as abort(3) does.
        machine: name of the processor; None for this machine's.

    Raises:
        KeyError: there is no table for this processor.
    """
    at, architecture = _MACHINES[machine or platform.machine()]

    def number(name: str) -> int:
        found = CHECKED_CALLS[name][at]
        assert found is not None  # noqa: S101 - called for calls that every machine has
        return found

    allowed = CPU_CALLS | (GPU_CALLS if kind != CPU else {})
    # ENOSYS makes the C library fall back to clone, whose flags a filter can read.
    no_such_call = _step(_RETURN, _ERRNO | errno.ENOSYS)
    no_code = _argument(2) + _step(_ANY_BIT, _EXECUTABLE, yes=1) + _YES + _NO
    parts = [
        _step(_LOAD, _ARCHITECTURE_AT),
        _step(_EQUAL, architecture, yes=1),
        _NO,
        _step(_LOAD, _NUMBER_AT),
        _step(_AT_LEAST, _OTHER_ABI, no=1),
        _NO,
        _only(number("clone3"), no_such_call),
        _only(number("clone"), _argument(0) + _step(_ANY_BIT, _CLONE_THREAD, no=1) + _YES + _NO),
        _only(number("tgkill"), _argument(0) + _step(_EQUAL, pid, no=1) + _YES + _NO),
        _only(number("prctl"), _argument(0) + _step(_EQUAL, _SET_NAME, no=1) + _YES + _NO),
        _only(number("mprotect"), _YES if kind == SOFTWARE else no_code),
        _only(number("mmap"), _YES if kind == SOFTWARE else _mapping(kind)),
    ]
    if kind != CPU:
        # Limits may be read, not set: the pointer to new ones must be null.
        null = _argument(2) + _step(_EQUAL, 0, no=3) + _argument(2, high=True) + _step(_EQUAL, 0, no=1) + _YES + _NO
        parts.append(_only(number("prlimit64"), null))
    parts += [
        _only(found, _YES) for found in sorted(pair[at] or 0 for pair in allowed.values() if pair[at] is not None)
    ]
    return b"".join((*parts, _NO))


def _mapping(kind: str) -> bytes:
    if kind == CPU:
        # Memory only: no files, nothing executable.
        executable = _argument(2) + _step(_ANY_BIT, _EXECUTABLE, yes=3)
        return executable + _argument(3) + _step(_ANY_BIT, _ANONYMOUS, no=1) + _YES + _NO
    # Code may come from files, which Landlock limits and this process cannot write; never from memory.
    harmless = _argument(2) + _step(_ANY_BIT, _EXECUTABLE, yes=1) + _YES
    written = _step(_ANY_BIT, _WRITABLE, yes=3)
    return harmless + written + _argument(3) + _step(_ANY_BIT, _ANONYMOUS, yes=1) + _YES + _NO


# What follows is from linux/landlock.h.

_CREATE_RULES, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION_ASKED = 1
_PATH_BENEATH = 1
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR, _MAKE_SOCK, _IOCTL = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 9, 1 << 15
_FILE_RIGHTS = (0, (1 << 13) - 1, (1 << 14) - 1, (1 << 15) - 1, (1 << 15) - 1, (1 << 16) - 1)
"""All rights to files, by version of Landlock; versions after the last have the same as that."""
_NET_RIGHTS, _SCOPES = 3, 3
_NET_SINCE, _SCOPES_SINCE = 4, 6

DEVICES = ("/dev/nvidia*", "/dev/nvidia-caps", "/dev/dri", "/dev/kfd", "/dev/null", "/dev/zero")
"""What a GPU driver opens for writing."""
SYSTEM = ("/usr", "/lib", "/lib64", "/opt", "/nix/store", "/gnu/store", "/sys", "/run/opengl-driver",
          "/etc/ld.so.cache", "/etc/OpenCL", "/etc/vulkan", "/etc/nvidia", "/dev/urandom", "/dev/random")  # fmt: skip
"""Libraries and settings of the driver."""
PROCESS = ("/proc/self", "/proc/driver", "/proc/cpuinfo", "/proc/meminfo", "/proc/devices", "/proc/modules",
           "/proc/filesystems", "/proc/version", "/proc/sys/vm", "/proc/sys/kernel")  # fmt: skip
"""What the driver reads about the system. Of the processes it may read only its own; exec keeps the number."""


def landlock_version() -> int:
    """The kernel's version of Landlock; 0 for none."""
    if not sys.platform.startswith("linux"):
        return 0
    return max(0, _libc().syscall(ctypes.c_long(_CREATE_RULES), None, ctypes.c_size_t(0), _VERSION_ASKED))


def has_seccomp() -> bool:
    """Whether this system has seccomp filters, and this file a table for its processor."""
    if not sys.platform.startswith("linux") or platform.machine() not in _MACHINES:
        return False
    try:
        with open("/proc/sys/kernel/seccomp/actions_avail") as file:  # noqa: PTH123 - this script imports little
            return "errno" in file.read().split()
    except OSError:
        return False


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _rules() -> int:
    """A rule set that allows nothing. Raises OSError."""
    version = landlock_version()
    files = _FILE_RIGHTS[min(version, len(_FILE_RIGHTS) - 1)]
    fields = [files]
    if version >= _NET_SINCE:
        fields.append(_NET_RIGHTS)
    if version >= _SCOPES_SINCE:
        fields.append(_SCOPES)
    data = struct.pack(f"={len(fields)}Q", *fields)
    found = _libc().syscall(ctypes.c_long(_CREATE_RULES), data, ctypes.c_size_t(len(data)), 0)
    if found < 0:
        raise OSError(ctypes.get_errno(), "Landlock accepts no rules")
    return found


def _allow(rules: int, path: str, rights: int) -> None:
    """Allow these rights below a path, if it exists. Raises OSError."""
    version = landlock_version()
    rights &= _FILE_RIGHTS[min(version, len(_FILE_RIGHTS) - 1)]
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not os.path.isdir(path):  # noqa: PTH112
            rights &= ~(_READ_DIR | _MAKE_SOCK)
        rule = struct.pack("=Qi", rights, fd)
        if _libc().syscall(ctypes.c_long(_ADD_RULE), rules, _PATH_BENEATH, rule, 0) != 0:
            raise OSError(ctypes.get_errno(), f"Landlock accepts no rule for {path}")
    finally:
        os.close(fd)


def around(path: str, kept: list[str]) -> list[str]:
    """The parts of a directory that contain none of the `kept` ones.

    Landlock rules can only allow. So if the user's home lies in /opt, everything else in /opt is allowed one by one.
    """
    real = os.path.realpath(path)
    if not any(one.startswith(real.rstrip("/") + "/") for one in kept):
        return [path]
    try:
        inside = [os.path.join(real, name) for name in os.listdir(real)]  # noqa: PTH118, PTH208
    except OSError:
        return []
    return [part for one in inside if os.path.realpath(one) not in kept for part in around(one, kept)]


def _restrict_to_driver(listen: str, readable: list[str], kept: list[str]) -> None:
    """From now on, in this thread and all that it starts: read libraries and settings, use devices, nothing else."""
    import glob

    rules = _rules()
    for pattern in (*SYSTEM, *PROCESS, *readable):
        for place in glob.glob(pattern):  # noqa: PTH207
            for path in around(place, kept):
                _allow(rules, path, _READ_FILE | _READ_DIR | _EXECUTE)
    for pattern in DEVICES:
        for path in glob.glob(pattern):  # noqa: PTH207
            _allow(rules, path, _READ_FILE | _WRITE_FILE | _READ_DIR | _IOCTL)
    _allow(rules, os.path.dirname(listen), _MAKE_SOCK)  # noqa: PTH120
    if _libc().syscall(ctypes.c_long(_RESTRICT), rules, 0) != 0:
        raise OSError(ctypes.get_errno(), "Landlock cannot be put in force")
    os.close(rules)


# macOS. Written from the documentation of sandbox_init(3), and never tested.
_PROFILE = "(version 1)(deny default)(allow sysctl-read)(allow signal (target self))(allow system-socket)"
_PROFILE_GPU = '(allow iokit-open)(allow mach-lookup)(allow file-read* (subpath "/System") (subpath "/usr/lib"))'


@dataclass(frozen=True)
class Options:
    """The command line. `kind` empty: not confined."""

    library: str
    listen: str
    kind: str
    readable: list[str]
    kept: list[str]


def _go_first() -> None:
    """If memory runs out, the kernel ends this process first: another machine decides how much it uses."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
            file.write("1000")
    except OSError:
        return  # then the kernel chooses


def environment(options: Options) -> dict[str, str]:
    """The environment with the library's variables; sets limits that the program inherits. Raises OSError."""
    own = dict(os.environ)
    before = own.get(PRELOAD, "")
    own |= {PRELOAD: f"{options.library}:{before}" if before else options.library, LISTEN: options.listen}
    if sys.platform.startswith("linux"):
        _go_first()
    if sys.platform.startswith("linux") and _libc().prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_NO_NEW_PRIVS) failed")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # No RLIMIT_NPROC: it counts all of the user's processes and threads. The filter refuses new processes anyway.
    most = min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if not options.kind:
        return own
    if sys.platform == "darwin":
        return own | {FILTER: _PROFILE + (_PROFILE_GPU if options.kind != CPU else "")}
    if options.kind != CPU:
        # Now, not when the server listens: the threads that a driver starts must be restricted too.
        _restrict_to_driver(options.listen, options.readable, options.kept)
    elif landlock_version():
        rules = _rules()
        os.set_inheritable(rules, True)
        own[RULES] = str(rules)
    return own | {FILTER: filter_program(options.kind, os.getpid()).hex()}


def main(arguments: list[str]) -> int:
    """Parse, prepare, run. Returns only if the program cannot be run."""
    split = arguments.index("--")
    program = arguments[split + 1 :]
    values: dict[str, list[str]] = {}
    for name, value in zip(arguments[:split:2], arguments[1:split:2], strict=True):
        values.setdefault(name, []).append(value)
    options = Options(
        library=values["--library"][0],
        listen=values["--listen"][0],
        kind=values.get("--kind", [""])[0],
        readable=values.get("--read", []),
        kept=[os.path.realpath(one) for one in values.get("--keep", [])],
    )
    try:
        os.execve(program[0], program, environment(options))  # noqa: S606 - the program is what the source chose
    except OSError as error:
        print(f"cannot run {program[0]}: {error}", file=sys.stderr)  # noqa: T201 - goes to the child's log
        return 127


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
