"""Takes from a process what an RPC server never needs: on Linux, system calls that reach beyond it.

Whoever gets past the checks before an RPC server still runs in there. So it cannot start programs, connect to others,
look into other processes or load anything into the kernel. A filter once set cannot be taken off. See seccomp(2).
"""

import ctypes
import errno
import os
import platform
import struct
import sys

_SET_NO_NEW_PRIVS = 38
_FILTER, _ALL_THREADS = 1, 1
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_CLONE_THREAD = 0x00010000
_NUMBER_AT, _ARCHITECTURE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_OTHER_ABI = 0x40000000

# Architecture in the kernel's audit numbers; seccomp, clone, clone3, connect; and what is refused outright.
_X86_64 = (
    0xC000003E, 317, 56, 435, 42,
    (59, 322, 57, 58, 101, 310, 311, 321, 298, 165, 166, 272, 308, 248, 249, 250, 175, 313, 304, 323, 425, 246, 155,
     161, 438, 312),
)  # fmt: skip
_ARM64 = (
    0xC00000B7, 277, 220, 435, 203,
    (221, 281, 117, 270, 271, 280, 241, 40, 39, 97, 268, 217, 218, 219, 105, 273, 265, 282, 425, 104, 41, 51, 438, 272),
)  # fmt: skip
# execve, execveat, (fork, vfork,) ptrace, process_vm_*, bpf, perf_event_open, mount, umount2, unshare, setns, keys,
# modules, open_by_handle_at, userfaultfd, io_uring_setup, kexec_load, pivot_root, chroot, pidfd_getfd, kcmp.

_MACHINES = {"x86_64": _X86_64, "aarch64": _ARM64}


def confine(*, connects: bool) -> bool:
    """Confine this process and all of its threads; whether that was possible.

    Args:
        connects: leave it connect(2): drivers of some accelerators talk to a service of theirs.
    """
    table = _MACHINES.get(platform.machine())
    if not sys.platform.startswith("linux") or table is None:
        return False
    architecture, seccomp, clone, clone3, connect, refused = table
    filter_ = _program(architecture, clone, clone3, refused if connects else (*refused, connect))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    buffer = ctypes.create_string_buffer(filter_, len(filter_))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(filter_) // 8, ctypes.addressof(buffer)))
    return libc.syscall(ctypes.c_long(seccomp), _FILTER, _ALL_THREADS, program) == 0


def _program(architecture: int, clone: int, clone3: int, refused: tuple[int, ...]) -> bytes:
    """The filter, in the kernel's classic BPF: u16 code, u8 jump if true, u8 jump if false, u32 operand."""

    def step(code: int, operand: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, operand)

    def refuse(error: int) -> bytes:
        return step(_RETURN, _ERRNO | error)

    parts = [
        step(_LOAD, _ARCHITECTURE_AT),
        step(_EQUAL, architecture, yes=1),
        refuse(errno.EPERM),
        step(_LOAD, _NUMBER_AT),
        step(_AT_LEAST, _OTHER_ABI, no=1),
        refuse(errno.EPERM),
        # The C library falls back to clone, whose flags can be seen.
        step(_EQUAL, clone3, no=1),
        refuse(errno.ENOSYS),
    ]
    for number in refused:
        parts += [step(_EQUAL, number, no=1), refuse(errno.EPERM)]
    parts += [
        step(_EQUAL, clone, no=3),
        step(_LOAD, _FIRST_ARGUMENT_AT),
        step(_ANY_BIT, _CLONE_THREAD, yes=1),
        refuse(errno.EPERM),
        step(_RETURN, _ALLOW),
    ]
    return b"".join(parts)


def limit_files() -> None:
    """No more open files than it needs, and no core dump."""
    if os.name == "posix":
        import resource

        soft = min(256, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
