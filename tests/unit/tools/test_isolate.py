"""The command that keeps tests off the network, run as `make test` runs it."""

import os
import pty
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ISOLATE = Path(__file__).resolve().parents[3] / "tools" / "isolate.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are Linux's")


def argv(*command: str) -> list[str]:
    return [sys.executable, str(ISOLATE), "--", *command]


def isolated(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv(*command), capture_output=True, text=True, timeout=60, check=False)


def python(script: str) -> Sequence[str]:
    return (sys.executable, "-c", script)


def ended(process: int) -> bool:
    """Whether the process of a pidfd ends, within a deadline."""
    return bool(select.select([process], [], [], 10)[0])


def test_loopback_works_and_there_is_no_route() -> None:
    script = """
import errno, socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
assert socket.socket().connect_ex(("192.0.2.1", 80)) == errno.ENETUNREACH
assert [name for _, name in socket.if_nameindex()] == ["lo"]
"""
    done = isolated(*python(script))
    assert (done.returncode, done.stderr) == (0, "")


def test_it_is_a_namespace_of_its_own() -> None:
    mine = Path("/proc/self/ns/net").stat().st_ino
    inside = isolated("stat", "-Lc", "%i", "/proc/self/ns/net").stdout
    assert int(inside) != mine


def test_output_input_and_environment_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOLATE_TEST", "here")
    done = subprocess.run(
        argv("sh", "-c", 'cat; echo "$ISOLATE_TEST $1" >&2', "sh", "a b"),
        input="in",
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("in", "here a b\n")


@pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + signal.SIGTERM)])
def test_the_exit_status_is_the_commands(script: str, status: int) -> None:
    assert isolated("sh", "-c", script).returncode == status


def test_a_command_that_does_not_exist() -> None:
    done = isolated("no-such-command")
    assert (done.returncode, done.stderr) == (127, "isolate: no-such-command: command not found\n")


def test_a_command_that_may_not_be_run(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a program")
    assert isolated(str(tmp_path / "data")).returncode == 126


def test_without_a_command_it_says_how() -> None:
    done = subprocess.run([sys.executable, str(ISOLATE)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "usage:" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signals_reach_the_command_once(number: signal.Signals) -> None:
    script = f"""
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [{number.value}])
print("ready", flush=True)
signal.sigwait([{number.value}])
assert signal.sigtimedwait([{number.value}], 0.2) is None, "came twice"
sys.exit(42)
"""
    running = subprocess.Popen(argv(*python(script)), stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    with running.stdout as output:
        assert output.readline() == "ready\n"
        running.send_signal(number)
        assert running.wait(10) == 42


def test_ctrl_c_on_a_terminal_reaches_the_command_once() -> None:
    script = """
import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print("ready", flush=True)
signal.sigwait([signal.SIGINT])
assert signal.sigtimedwait([signal.SIGINT], 0.2) is None, "came twice"
sys.exit(42)
"""
    # A fresh session whose terminal is the new one, as under a shell.
    start = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    keyboard, terminal = pty.openpty()
    running = subprocess.Popen(
        [sys.executable, "-c", start, *argv(*python(script))],
        stdin=terminal,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    assert running.stdout is not None
    with running.stdout as output:
        assert output.readline() == "ready\n"
        os.write(keyboard, b"\x03")
        assert running.wait(10) == 42
    os.close(keyboard)
    os.close(terminal)


def test_what_the_command_leaves_running_is_ended_and_named() -> None:
    # It has a session of its own, its parent is gone, and it does not listen to SIGTERM.
    deaf = 'import os, signal; signal.signal(15, signal.SIG_IGN); os.write(3, b"%d\\n" % os.getpid()); signal.pause()'
    script = f"setsid {shlex.quote(sys.executable)} -c '{deaf}' 3>&1 >/dev/null 2>&1 & read -r line; exit 3"
    running = subprocess.Popen(
        argv("sh", "-c", script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdin is not None
    assert running.stdout is not None
    pid = int(running.stdout.readline())
    end = os.pidfd_open(pid)
    name = Path(f"/proc/{pid}/comm").read_text().strip()
    _, stderr = running.communicate("go\n", timeout=10)
    try:
        assert ended(end)
    finally:
        os.close(end)
    assert running.returncode == 3
    assert stderr == f"isolate: ended what the command left running: {name} ({pid})\n"


def test_the_command_ends_with_its_supervisor() -> None:
    running = subprocess.Popen(argv("sh", "-c", "echo $$; exec sleep 1000"), stdout=subprocess.PIPE, text=True)
    assert running.stdout is not None
    with running.stdout as output:
        pid = int(output.readline())
    end = os.pidfd_open(pid)
    try:
        running.kill()
        running.wait(10)
        assert ended(end)
    finally:
        os.close(end)


NO_NAMESPACES = """
import ctypes, os, sys
sys.path.insert(0, os.path.dirname({isolate!r}))
import isolate
{change}
sys.exit(isolate.main(["--", "sh", "-c", "echo ran; exit 5"]))
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("sys.platform = 'darwin'", "isolate: no network namespaces on darwin: running without isolation\n"),
        (
            "def refuse(flags): raise PermissionError(1, 'Operation not permitted')\nisolate._unshare = refuse",
            "isolate: no network namespace may be made here (Operation not permitted): running without isolation\n",
        ),
    ],
    ids=["elsewhere", "not permitted"],
)
def test_without_namespaces_it_says_so_and_runs_the_command(change: str, said: str) -> None:
    script = NO_NAMESPACES.format(isolate=str(ISOLATE), change=change)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (5, "ran\n", said)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_an_ordinary_user_gets_a_namespace_where_the_system_allows_it() -> None:
    become = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"]
    # The script comes by standard input: the user may not be able to read this checkout.
    command = [*become, "/usr/bin/env", "python3", "-", "--", "sh", "-c", "id -u; wc -l </proc/net/route"]
    done = subprocess.run(command, input=ISOLATE.read_text(), capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    if "without isolation" not in done.stderr:
        assert done.stdout == "0\n1\n", "root of its own namespace, and a routing table with nothing but a heading"
