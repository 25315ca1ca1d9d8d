"""A peer's text about models never becomes a path outside the models directory."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.bulk_pipe import BulkPipe

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import BulkStream
from mesh_llm.models.hub.source_ref import parse_source
from mesh_llm.models.p2p.assembler import ChooseDestination, Destination, in_directory, in_hub_cache
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.models.p2p.seeder import RateLimit, SeededModel, Seeder
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.frames import frame
from mesh_llm.wire.mesh.streams import (
    REPLY_HEAD,
    ModelParameters,
    ReplyKind,
    WantChunk,
    WantDigests,
    WantOffer,
    decode_reply_head,
)

ROOT = Path("/models")
SHA256 = b"\xab" * 32
HOSTILE = (
    "..", ".", "", "/", "//", "\\", "../..", "..\\..", "/etc/passwd", "C:\\x", "~", "%2e%2e", "a/../../b", "\0", "\n",
    "\u202e", "con", "a" * 300, "-rf", ".hidden", "mmproj", "model", ":", "@", "x.gguf",
)  # fmt: skip
_pieces = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8))
_words = st.lists(_pieces, min_size=1, max_size=4)


def inside(place: Destination) -> bool:
    paths = (place.partial, place.checked, place.lock, place.target)
    return all(Path(os.path.normpath(path)).is_relative_to(ROOT) and "\0" not in str(path) for path in paths)


def check(place_file: ChooseDestination, projector: str) -> None:
    try:
        place = place_file(0, 1, SHA256, projector)
    except MeshError:
        return
    assert inside(place), place


@given(_words.map("".join), _pieces)
def test_a_hostile_served_name_does_not_become_a_path(name: str, projector: str) -> None:
    try:
        place_file = in_directory(name, ROOT)
    except MeshError:
        return
    check(place_file, projector)
    assert place_file(0, 1, SHA256, "").target.parent == ROOT


@given(_pieces, _pieces, _words.map("/".join), st.one_of(_pieces, st.just("a" * 40)), _pieces)
def test_a_hostile_announced_source_does_not_become_a_path(
    owner: str, repository: str, file: str, revision: str, projector: str
) -> None:
    try:
        ref = parse_source(f"hf:{owner}/{repository}:{file}.gguf@{revision}")
    except MeshError:
        return
    place_file = in_hub_cache(ref, ROOT)
    if place_file is not None:
        check(place_file, projector)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "m/../../secret", "secret", "M", "..%2fsecret"])
@pytest.mark.parametrize("request_", [WantOffer(), WantDigests(0), WantChunk(0, 0), WantChunk(511, 0)])
async def test_requested_names_are_looked_up_and_never_opened_as_paths(
    tmp_path: Path, name: str, request_: WantOffer | WantDigests | WantChunk
) -> None:
    model = tmp_path / "models" / "m.gguf"
    model.parent.mkdir()
    model.write_bytes(b"GGUF" * 100)
    (tmp_path / "secret").write_bytes(b"secret" * 100)
    known = {("m", "ab"): SeededModel((model,))}
    giver = Seeder(
        lambda asked, fingerprint: known.get((asked, fingerprint)), ChunkDigestStore(tmp_path / "d"), RateLimit(None)
    )
    asker, side = BulkPipe.pair()
    stream: BulkStream = side
    try:
        await asker.write(frame(encode(request_)))
        await asker.finish()
        await giver.serve(stream, NodeId("1" * 64), encode(ModelParameters(name, "ab")))
        answer = b""
        while piece := await asker.read(65536):
            answer += piece
    finally:
        await giver.close()
    head = decode_reply_head(answer[:REPLY_HEAD])
    assert getattr(head, "kind", None) is ReplyKind.REFUSED
    assert b"secret" not in answer
    assert b"GGUF" not in answer
