"""Runs a program that ends with its parent. A script of its own: standard library only, started with `-I -S`.

    python -I -S guard.py --parent PID [--watch-stdin] -- PROGRAM ARGUMENTS...

On Linux the kernel kills this process when the parent dies, and the program takes its place (same pid). Elsewhere, or
with --watch-stdin, it stays beside the program, and kills it when stdin ends, which the parent holds open.
"""

import contextlib
import os
import resource
import select
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_STACK_BYTES = 8 << 20
_EXIT_ORPHANED = 137
_EXIT_NOT_FOUND = 127


def main(arguments: list[str]) -> int:
    """Parse, protect, run. Returns an exit status if the program does not take this process's place."""
    split = arguments.index("--")
    options, program = arguments[:split], arguments[split + 1 :]
    parent = int(options[options.index("--parent") + 1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _bound_stack()
    watch = "--watch-stdin" in options or not sys.platform.startswith("linux")
    if sys.platform.startswith("linux"):
        _prefer_for_oom_killer()
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)
        if not watch:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have died before prctl.
    if os.getppid() != parent:
        return _EXIT_ORPHANED
    if watch:
        return _watch(program)
    return _exec(program)


def _bound_stack() -> None:
    # Threads use this as their stack size. Without a limit, a recursion uses up all memory before it ends.
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    if hard == resource.RLIM_INFINITY or hard > _STACK_BYTES:
        resource.setrlimit(resource.RLIMIT_STACK, (_STACK_BYTES, hard))


def _exec(program: list[str]) -> int:
    try:
        os.execvp(program[0], program)  # noqa: S606 - the program is what the supervisor chose
    except OSError as error:
        print(f"cannot run {program[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201 - goes to the child's log
        return _EXIT_NOT_FOUND


def _prctl(option: int, value: int) -> None:
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def _prefer_for_oom_killer() -> None:
    # When memory runs out, the engine should end, not the daemon, which can report it. Some sandboxes lack this file.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:  # noqa: PTH123
        file.write("500")


def _watch(program: list[str]) -> int:
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, _ignore)
    child = os.fork()
    if child == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os._exit(_exec(program))
    while True:
        readable, _, _ = select.select([0, ended], [], [])
        if 0 in readable and not os.read(0, 4096):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return _EXIT_ORPHANED
        if ended in readable:
            os.read(ended, 4096)
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid == child:
                return _leave_as(status)


def _ignore(_number: int, _frame: object) -> None:
    """The call itself wakes `select`."""


def _leave_as(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
    return 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
