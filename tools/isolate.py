"""Run a command where no packet can leave the machine.

    python tools/isolate.py -- COMMAND ARGUMENTS...

On Linux, as root or with user namespaces, the command gets a network namespace of its own: 127.0.0.1 and ::1 work, and
there is no route to anywhere else (network_namespaces(7)). Elsewhere one line says that there is no isolation, and the
command runs as it is. Signals are passed on, the exit status is the command's (128 + n when signal n ended it), and
what the command leaves running is ended with it. Standard library only, since it runs before anything is installed.
"""

import ctypes
import fcntl
import os
import signal
import socket
import struct
import sys
from pathlib import Path

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 0x1
_SI_KERNEL = 128

_EXIT_USAGE, _EXIT_CANNOT_RUN, _EXIT_NOT_FOUND, _EXIT_SIGNAL = 2, 126, 127, 128

_WATCHED = (
    {
        signal.SIGCHLD,
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
    if sys.platform != "win32"
    else set[signal.Signals]()
)


def main(arguments: list[str]) -> int:
    """Run the command in `arguments`, after an optional `--`; return the exit status for this process."""
    command = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not command:
        print("usage: python tools/isolate.py -- COMMAND [ARGUMENT...]", file=sys.stderr)
        return _EXIT_USAGE
    if sys.platform != "linux":
        _say(f"no network namespaces on {sys.platform}: running without isolation")
        return _execute(command)
    return _run_and_supervise(command)


def enter_namespace() -> str | None:
    """Move this process into a new network namespace with loopback up; say why not, where that is not possible.

    Without the right to do so as it is, the process becomes root of a new user namespace first, as `unshare -rn` does.
    """
    try:
        _unshare(_CLONE_NEWNET)
    except OSError as failure:
        try:
            _enter_user_namespace()
        except OSError:
            return failure.strerror or str(failure)
    _bring_loopback_up()
    return None


def _run_and_supervise(command: list[str]) -> int:
    # Processes whose parent ends become ours, so that they can be found at the end.
    _libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Blocked before the child exists: none of its signals, or ours for it, is missed.
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)
    supervisor = os.getpid()
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
        os._exit(_become_command(command, supervisor))
    status = _supervise(child)
    _end_leftovers()
    return status


def _become_command(command: list[str], supervisor: int) -> int:
    """In the child. Returns only when the command cannot be run."""
    reason = enter_namespace()
    if reason is not None:
        _say(f"no network namespace may be made here ({reason}): running without isolation")
    # After the namespaces, as a change of credentials clears it; too late if the supervisor has gone by now.
    _libc().prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        return _EXIT_CANNOT_RUN
    return _execute(command)


def _execute(command: list[str]) -> int:
    try:
        os.execvp(command[0], command)
    except FileNotFoundError:
        _say(f"{command[0]}: command not found")
        return _EXIT_NOT_FOUND
    except OSError as failure:
        _say(f"{command[0]}: {failure.strerror}")
        return _EXIT_CANNOT_RUN


def _supervise(child: int) -> int:
    """Pass signals on until the child ends; return the exit status that tells how."""
    while True:
        received = signal.sigwaitinfo(_WATCHED)
        if received.si_signo == signal.SIGCHLD:
            status = _reap(child)
            if status is not None:
                return status
        elif received.si_code != _SI_KERNEL:
            # What comes from the terminal (Ctrl-C) went to the child as well: twice would mean something else to it.
            os.kill(child, received.si_signo)


def _reap(child: int) -> int | None:
    """Collect every process that has ended; the exit status if `child` is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            found = code if code >= 0 else _EXIT_SIGNAL - code


def _end_leftovers() -> None:
    """Kill and collect all descendants. The children of a killed process become ours, so this ends with none left."""
    ended: list[str] = []
    while children := _children():
        for pid, name in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            ended.append(f"{name} ({pid})")
    if ended:
        _say(f"ended what the command left running: {', '.join(ended)}")


def _children() -> list[tuple[int, str]]:
    """Pid and name of each living child of this process."""
    _reap(-1)
    children: list[tuple[int, str]] = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except OSError:
                continue  # it has ended in the meantime
            name, _, rest = stat.partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == os.getpid():
                children.append((int(entry.name), name))
    return children


def _enter_user_namespace() -> None:
    user, group = os.geteuid(), os.getegid()
    _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    # Root there, so that the command keeps its rights over its own namespaces when it executes programs.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")


def _bring_loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sH22x", b"lo", 0)
        (flags,) = struct.unpack_from("H", fcntl.ioctl(control, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", flags | _IFF_UP))


def _unshare(flags: int) -> None:
    if _libc().unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _say(text: str) -> None:
    print(f"isolate: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
