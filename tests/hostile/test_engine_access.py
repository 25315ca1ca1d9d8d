"""Only this user's node can use an engine: no other user of the machine, no web page, no other program."""

import asyncio
import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.hostile.test_confined_worker import REACH, as_nobody
from tests.integration.engine_fixtures import Model, client_of, embedded, model, small_spec, started, supervisor
from tests.support.http import HttpClient

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor

__all__ = ["embedded", "model", "supervisor"]

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "the mesh"}], "max_tokens": 2}
PAGE = {"host": "evil.example", "origin": "http://evil.example"}


async def test_the_engine_refuses_requests_without_the_key(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "s")
    assert engine.socket is not None
    for headers in ({}, PAGE, PAGE | {"authorization": "Bearer guess"}):
        client = HttpClient(0, path=str(engine.socket), headers=headers)
        assert (await client.post("/v1/chat/completions", CHAT)).status == 401
        for path in ("/props", "/slots", "/metrics", "/v1/models"):
            assert (await client.get(path)).status == 401
    (await client_of(engine).post("/v1/chat/completions", CHAT)).expect()


async def test_each_start_has_its_own_key_and_no_command_line_shows_it(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engines = [await started(supervisor, embedded, small_spec(model("small")), name) for name in ("a", "b")]
    keys = {engine.info.key for engine in engines if engine.info is not None}
    assert len(keys) == 2
    for engine in engines:
        words = " ".join(psutil.Process(engine.pid).cmdline())
        assert not any(key in words for key in keys)
        assert engine.info is not None
        assert engine.info.key not in repr(engine.info)
        # The key file was read and deleted.
        assert engine.socket is not None
        assert not list(engine.socket.parent.glob("*.key"))
        assert not psutil.Process(engine.pid).net_connections("inet")


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="this test becomes another user")
async def test_another_user_of_the_machine_cannot_connect(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "s")
    assert engine.socket is not None
    assert as_nobody(REACH, str(engine.socket)) == "PermissionError"


def guards(maps: list[list[str]]) -> Iterator[int]:
    """The unmapped bytes below each region of a stack's size."""
    for (below, kept, *_), (above, used, *_) in itertools.pairwise(maps):
        (low, high), (start, end) = (tuple(int(part, 16) for part in one.split("-")) for one in (below, above))
        if (kept[:3], used[:3], start) == ("---", "rw-", high) and 8 << 20 <= end - start <= 9 << 20:
            yield high - low


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_its_stacks_have_wide_guards_and_it_writes_no_core_file(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "s")
    lines = await asyncio.to_thread(lambda: Path(f"/proc/{engine.pid}/maps").read_text().splitlines())
    stacks = list(guards([line.split() for line in lines]))
    assert len(stacks) >= 4
    assert min(stacks) >= 1 << 20
    limits = await asyncio.to_thread(lambda: Path(f"/proc/{engine.pid}/limits").read_text().splitlines())
    assert next(line for line in limits if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]
    assert next(line for line in limits if line.startswith("Max stack size")).split()[3] == str(8 << 20)


async def test_endless_recursion_in_a_grammar_ends_the_engine_cleanly(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    """The API refuses such a grammar, but anybody with the key could send it."""
    engine = await started(supervisor, embedded, small_spec(model("small")), "s")
    deep = "root ::= " + "(" * 200_000 + '"a"' + ")" * 200_000
    with contextlib.suppress(ConnectionError):
        await client_of(engine).post("/v1/chat/completions", CHAT | {"grammar": deep})
    async with asyncio.timeout(30):
        outcome = await engine.wait()
    assert outcome.code == -signal.SIGSEGV


async def test_no_socket_and_no_key_are_left_after_closing(
    tmp_path: Path, embedded: EmbeddedSource, model: Model
) -> None:
    supervisor = Supervisor(tmp_path / "logs")
    engine = await started(supervisor, embedded, small_spec(model("small")), "s")
    assert engine.socket is not None
    directory = engine.socket.parent
    await engine.stop()
    await supervisor.close()
    assert not directory.exists()
