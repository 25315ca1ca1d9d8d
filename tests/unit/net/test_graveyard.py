"""Objects of iroh are freed on the event loop, after the wrappers that still need them."""

import gc
import subprocess
import sys
import threading
from typing import Any

import iroh
import pytest

from mesh_llm.net.quic import bindings


class Wrapper:
    """Like a stream's: in a cycle, and with something to say before it goes."""

    def __init__(self, said: list[object], inner: object) -> None:
        self.said, self.inner, self.itself = said, inner, self

    def __del__(self) -> None:
        bindings.before_frees(self.farewell)

    def farewell(self) -> None:
        self.said.append(("farewell", threading.get_ident()))


def inner_kind(said: list[object]) -> Any:
    class Inner:
        def __del__(self) -> None:
            said.append(("freed", threading.get_ident()))

    bindings.defer_frees_of(Inner)
    return Inner


def test_what_the_collector_finds_in_another_thread_is_freed_here_and_in_order():
    bindings.free_all()
    said: list[object] = []
    kind = inner_kind(said)
    for _ in range(20):
        Wrapper(said, kind())
    collector = threading.Thread(target=gc.collect)
    collector.start()
    collector.join()
    assert said == []
    assert bindings.frees_pending()
    bindings.free_all()
    here = threading.get_ident()
    assert said == [("farewell", here)] * 20 + [("freed", here)] * 20
    assert not bindings.frees_pending()
    gc.collect()
    assert len(said) == 40


@pytest.mark.parametrize("kind", [iroh.SendStream, iroh.RecvStream, iroh.BiStream, iroh.Connection, iroh.Endpoint])
def test_the_bindings_objects_go_the_same_way(kind: type):
    assert bindings.install()
    assert kind.__del__.__module__ == bindings.__name__  # pyright: ignore[reportAttributeAccessIssue]


def test_a_key_that_is_dropped_is_freed_by_tending():
    assert bindings.install()
    bindings.free_all()
    key = iroh.SecretKey.generate()
    del key
    assert bindings.frees_pending()
    bindings.free_all()
    assert not bindings.frees_pending()


def test_what_lives_to_the_end_of_the_process_ends_in_silence():
    program = (
        "import ctypes, iroh; from mesh_llm.net.quic import bindings\n"
        "bindings.install(); ctypes.kept = iroh.SecretKey.generate()"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
