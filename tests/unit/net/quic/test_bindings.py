"""What iroh says in words, and its objects freed on the event loop after the wrappers that still need them."""

import gc
import subprocess
import sys
import threading
from typing import Any

import iroh
import pytest

from mesh_llm.net.quic import bindings
from mesh_llm.net.quic.bindings import close_reason, deferred_frees, stream_failure
from mesh_llm.wire.mesh.frames import CloseCode


class Wrapper:
    """Like a stream's: in a cycle, and with something to say before it goes."""

    def __init__(self, said: list[object], inner: object) -> None:
        self.said, self.inner, self.itself = said, inner, self

    def __del__(self) -> None:
        deferred_frees.before(self.farewell)

    def farewell(self) -> None:
        self.said.append(("farewell", threading.get_ident()))


def inner_kind(said: list[object]) -> Any:
    class Inner:
        def __del__(self) -> None:
            said.append(("freed", threading.get_ident()))

    deferred_frees.take_over(Inner)
    return Inner


def test_what_the_collector_finds_in_another_thread_is_freed_here_and_in_order():
    deferred_frees.run()
    said: list[object] = []
    kind = inner_kind(said)
    for _ in range(20):
        Wrapper(said, kind())
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join()
    assert said == []
    assert deferred_frees.pending
    deferred_frees.run()
    here = threading.get_ident()
    assert said == [("farewell", here)] * 20 + [("freed", here)] * 20
    assert not deferred_frees.pending
    gc.collect()
    assert len(said) == 40


@pytest.mark.parametrize("kind", [iroh.SendStream, iroh.RecvStream, iroh.BiStream, iroh.Connection, iroh.Endpoint])
def test_the_bindings_objects_go_the_same_way(kind: type):
    assert bindings.install()
    assert kind.__del__.__module__ == bindings.__name__  # pyright: ignore[reportAttributeAccessIssue]


def test_a_key_that_is_dropped_is_freed_by_tending():
    assert bindings.install()
    deferred_frees.run()
    key = iroh.SecretKey.generate()
    del key
    assert deferred_frees.pending
    deferred_frees.run()
    assert not deferred_frees.pending


def test_what_lives_to_the_end_of_the_process_ends_in_silence():
    program = (
        "import ctypes, iroh; from mesh_llm.net.quic import bindings\n"
        "bindings.install(); ctypes.kept = iroh.SecretKey.generate()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("text", "reason", "code"),
    [
        ("closed by peer: idle (code 1)", "idle", CloseCode.IDLE),
        ("closed by peer: two\nlines (code 0)", "two\nlines", CloseCode.GOODBYE),
        ("closed by peer: later version (code 99)", "later version", None),
        ("timed out", "timed out", None),
        ("", "connection lost", None),
        (None, "connection lost", None),
    ],
)
def test_why_a_connection_ended(text: str | None, reason: str, code: CloseCode | None):
    assert close_reason(text) == (reason, code)


class Failure:
    """As the binding's error: its text is in a method."""

    def __init__(self, text: str) -> None:
        self._text = text

    def message(self) -> str:
        return self._text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ConnectionLost(LocallyClosed)", "this node closed it"),
        ("ConnectionLost(TimedOut)", "the other node did not answer in time"),
        ("ConnectionLost(ApplicationClosed(ApplicationClose { error_code: 0 }))", "the other node closed it"),
        ("ConnectionLost(SomethingNew)", "the connection broke"),
    ],
)
def test_a_lost_connection_is_explained_in_words(text: str, says: str):
    assert str(stream_failure(Failure(text))) == says  # pyright: ignore[reportArgumentType]
