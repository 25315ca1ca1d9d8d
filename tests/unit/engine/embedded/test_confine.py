"""A confined process cannot reach beyond itself, and still does its work."""

import os
import subprocess
import sys

import pytest

_SCRIPT = """
import os, socket, subprocess, threading
from mesh_llm.engine.embedded.confine import confine, limit_files
running, stop = threading.Event(), threading.Event()
answers = []
def early():
    running.set(); stop.wait()
    answers.append(refused(lambda: os.execv("/bin/true", ["true"])))
def refused(call):
    try:
        call()
    except PermissionError:
        return True
    except OSError as error:
        return repr(error)
    return False
before = threading.Thread(target=early); before.start(); running.wait()
limit_files()
print(confine(connects=CONNECTS))
stop.set(); before.join()
listener = socket.create_server(("127.0.0.1", 0))
print(answers[0], refused(lambda: subprocess.run(["/bin/true"])), refused(os.fork))
print(refused(lambda: socket.create_connection(listener.getsockname(), 2)))
after = threading.Thread(target=print, args=("threads work",)); after.start(); after.join()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="seccomp is Linux's")
@pytest.mark.parametrize("connects", [False, True])
def test_no_programs_no_connections_but_threads(*, connects: bool) -> None:
    script = _SCRIPT.replace("CONNECTS", str(connects))
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    if first != "True":
        pytest.skip("this system does not let processes set filters")
    assert rest == ["True True True", str(not connects), "threads work"]
