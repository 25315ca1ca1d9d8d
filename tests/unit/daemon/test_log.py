import asyncio
import errno
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.log import DaemonLog, Signals, explain_disk_errors
from mesh_llm.daemon.main import run
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.admission import credentials as store


def test_own_words_and_those_of_libraries_go_to_the_file(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "daemon.log"
    before = structlog.get_config()
    log = DaemonLog(path, "info")
    try:
        own = structlog.get_logger("own")
        own.info("started", pid=5)
        own.debug("not for info")
        own.info("gone", reason="bye\n2026 [error] forged\x1b[2J\u202e")
        logging.getLogger("library").warning("beware of %s", "it")
        logging.getLogger("library").info("chatter")
        try:
            raise RuntimeError("a defect")
        except RuntimeError:
            own.exception("it failed", text="odd \udc80 text")
    finally:
        log.close()
    lines = path.read_text().splitlines()
    assert "started pid=5" in lines[0]
    assert "beware of it" in lines[2]
    # Nobody's words begin lines of their own, or move a reader's cursor.
    assert lines[1].endswith("gone reason='bye\ufffd2026 [error] forged\ufffd[2J\ufffd'")
    assert lines[1].isprintable()
    assert "chatter" not in path.read_text()
    assert "it failed" in lines[3]
    assert lines[-1] == "RuntimeError: a defect"
    assert structlog.get_config()["processors"] == before["processors"]


async def test_the_first_signal_asks_and_handlers_are_removed() -> None:
    asked = asyncio.Event()
    with Signals(lambda _: asked.set(), lambda: None) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(asked.wait(), 20.0)
        assert signals.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(lambda _: None, lambda: None) as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            await asyncio.sleep(0)
            assert signals.number == 0
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


_HANGUP = """
import asyncio, fcntl, os, signal, sys, termios
from mesh_llm.daemon.log import Signals
# As a shell starts it, not as nohup does, whatever these tests were started by.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
async def main():
    ended, said = asyncio.Event(), os.fdopen(int(sys.argv[1]), "w", buffering=1)
    with Signals(lambda _: ended.set(), lambda: None, lambda: print("reload", file=said)):
        print("here", file=said)
        await ended.wait()
    print("stop", file=said)
asyncio.run(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="terminals as POSIX has them")
def test_a_hangup_reads_the_configuration_unless_the_terminal_was_closed() -> None:
    master, terminal = os.openpty()
    reader, writer = os.pipe()
    program = [sys.executable, "-c", _HANGUP, str(writer)]
    child = subprocess.Popen(
        program, stdin=terminal, stdout=terminal, stderr=terminal, pass_fds=[writer], start_new_session=True
    )
    os.close(terminal)
    os.close(writer)
    with os.fdopen(reader) as said:
        assert said.readline() == "here\n"
        child.send_signal(signal.SIGHUP)
        assert said.readline() == "reload\n"
        os.close(master)
        assert said.readline() == "stop\n"
    assert child.wait(10.0) == 0


_TWICE = """
import asyncio, os, signal
from mesh_llm.daemon.log import Signals
async def main():
    with Signals(lambda _: os.kill(os.getpid(), signal.SIGINT), lambda: print("last words", flush=True)):
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
async def test_the_second_signal_ends_the_process() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", _TWICE, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 20.0)
    assert (process.returncode, output) == (128 + signal.SIGINT, b"last words\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
async def test_a_start_without_room_ends_with_what_to_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes, mode: int = 0o600) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store, "write_atomic", write)
    with pytest.raises(MeshError) as told:
        await run(Settings(home=tmp_path / "home"))
    assert told.value.code == "home_unwritable"
    assert str(tmp_path / "home") in told.value.message
    assert "MESH_LLM_HOME" in told.value.hint


def test_other_errors_pass() -> None:
    with pytest.raises(PermissionError), explain_disk_errors(Path("/home")):
        raise PermissionError(errno.EACCES, "no")
