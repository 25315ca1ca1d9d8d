"""Hostile files in the models directory: none stops the node, and none puts control characters into its output."""

import asyncio
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, named

from mesh_llm.models.library.library import FactsCache, scan

pytestmark = pytest.mark.timeout(120)

U64 = 2**64 - 1
MAGIC = struct.pack("<4sI", b"GGUF", 3)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def entry(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


HEADERS = {
    "tensors without end": MAGIC + struct.pack("<QQ", U64, 0),
    "entries without end": MAGIC + struct.pack("<QQ", 0, U64),
    "a name of 16 exabytes": MAGIC + struct.pack("<QQ", 0, 1) + struct.pack("<Q", U64),
    "a text of 16 exabytes": MAGIC + struct.pack("<QQ", 0, 1) + entry(b"general.name", 8, struct.pack("<Q", U64 - 1)),
    "an array of 2**63": MAGIC + struct.pack("<QQ", 0, 1) + entry(b"a", 9, struct.pack("<IQ", 8, 2**63)),
    "arrays in arrays": MAGIC + struct.pack("<QQ", 0, 1) + entry(b"a", 9, struct.pack("<IQ", 9, 1) * 100_000),
    "an unknown kind": MAGIC + struct.pack("<QQ", 0, 1) + entry(b"a", 999, b""),
    "a version of the future": struct.pack("<4sIQQ", b"GGUF", 2**31, 1, 1),
    "the other byte order": struct.pack(">4sIQQ", b"GGUF", 3, 0, 1),
    "nothing": b"",
    "four bytes": b"GGUF",
    "a tensor far behind the end": MAGIC
    + struct.pack("<QQ", 1, 1)
    + entry(b"general.architecture", 8, text(b"llama"))
    + text(b"t")
    + struct.pack("<IQQQIQ", 3, U64, U64, U64, 0, U64),
    "no dimensions that multiply": MAGIC
    + struct.pack("<QQ", 1, 1)
    + entry(b"general.architecture", 8, text(b"llama"))
    + text(b"t")
    + struct.pack("<I", 2**32 - 1),
    "a name that speaks to terminals": MAGIC
    + struct.pack("<QQ", 0, 1)
    + entry(b"general.name", 8, text(b"\x1b]0;owned\x07\x1b[2J\r\n\xff\xfe")),
}
NAMES = ("..gguf", "a\nb.gguf", "\x1b[31mred.gguf", "x" * 240 + ".gguf", "a%2f..%2fb.gguf", "’quoted’; rm -rf.gguf")


def lay_out(directory: Path) -> None:
    """One file of each kind, and things that are not files."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, (name, data) in enumerate(HEADERS.items()):
        (directory / f"{number:02}-{name.replace('*', '')}.gguf").write_bytes(data)
    for name in NAMES:
        (directory / name).write_bytes(HEADERS["a name that speaks to terminals"])
    os.mkfifo(directory / "pipe.gguf")
    (directory / "folder.gguf").mkdir()
    (directory / "device.gguf").symlink_to("/dev/zero")
    (directory / "loop.gguf").symlink_to(directory / "loop.gguf")
    (directory / "nowhere.gguf").symlink_to("/does/not/exist.gguf")
    (directory / "round").symlink_to(directory)
    with (directory / "hole.gguf").open("wb") as file:
        file.write(HEADERS["tensors without end"])
        file.truncate(2**40)


@pytest.mark.parametrize("data", HEADERS.values(), ids=HEADERS)
def test_a_file_with_a_hostile_header_is_not_a_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "hostile.gguf").write_bytes(data)
    began = time.monotonic()
    library = scan([tmp_path], FactsCache(), builtin=False)
    assert not library.models
    assert len(library.unusable) == 1
    assert library.unusable[0].reason
    assert time.monotonic() - began < 5


async def test_a_node_serves_beside_hostile_files(
    start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    models = tmp_path / "models"
    await asyncio.to_thread(lay_out, models)
    model = named(random_model("small"), "good", models)
    node = await start_node("a", models=["good"], models_dir=models, timeout=60.0)
    assert content(await chat(node, "good"))
    listed = (await node.api.get("/v1/models")).expect().json()["data"]
    assert [one["id"] for one in listed if one["id"] != "tiny"] == ["good"]
    for path in sorted(models.glob("*.gguf")):
        if path != model and path.exists():
            answer = await node.console.post("/api/load", {"model": str(path)})
            assert 400 <= answer.status < 500, (path, answer.status, answer.text)
    status, output = await node.cli("status")
    assert status == 0
    assert "\x1b" not in output
    status, output = await node.cli("models")
    assert "\x1b" not in output
    assert content(await chat(node, "good"))
