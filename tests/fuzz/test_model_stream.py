"""Random bytes from a node that requests a model, and from one that sends it: no crash, and no wrong file is kept."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.bulk_pipe import BulkPipe

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import BulkStream
from mesh_llm.models.p2p.assembler import in_directory
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.models.p2p.downloader import ModelDownload, NoSeedersError
from mesh_llm.models.p2p.seeder import RateLimit, SeededModel, Seeder
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.frames import frame
from mesh_llm.wire.mesh.streams import (
    MAX_REQUEST,
    REPLY_HEAD,
    ModelParameters,
    ModelRefused,
    ModelRequest,
    Offer,
    OfferedFile,
    Preparing,
    ReplyHead,
    ReplyKind,
    WantChunk,
    WantDigests,
    WantOffer,
    decode_model_parameters,
    decode_model_refused,
    decode_model_request,
    decode_offer,
    decode_preparing,
    decode_reply_head,
    encode_model_reply,
    reply_head,
)

NODE = NodeId("1" * 64)
ASKED = ModelParameters("m", "ab")

_sizes = st.integers(0, 1 << 44)
_offers = st.builds(
    Offer,
    st.lists(
        st.builds(OfferedFile, _sizes, st.binary(min_size=31, max_size=33), st.just(b"c" * 32), st.text(max_size=8)),
        max_size=3,
    ).map(tuple),
)
_replies = st.one_of(
    st.binary(max_size=40),
    st.builds(encode_model_reply, _offers),
    st.builds(encode_model_reply, st.builds(Preparing, _sizes, _sizes)),
    st.builds(encode_model_reply, st.builds(ModelRefused, st.text(max_size=20))),
    st.binary(max_size=200).map(lambda data: reply_head(ReplyKind.CHUNK, len(data)) + data),
    st.binary(max_size=200).map(lambda data: reply_head(ReplyKind.LIST, len(data)) + data),
    st.just(
        encode_model_reply(Offer((OfferedFile(100, b"s" * 32, b"c" * 32),)))
        + reply_head(ReplyKind.LIST, 32)
        + b"d" * 32
        + reply_head(ReplyKind.CHUNK, 100)
        + bytes(100)
    ),
)
_requests = st.one_of(
    st.binary(max_size=MAX_REQUEST),
    st.builds(encode, st.one_of(st.just(WantOffer()), st.builds(WantDigests, st.integers(0, 511)))),
    st.builds(encode, st.builds(WantChunk, st.integers(0, 2), st.integers(0, 1 << 18))),
)


@given(st.binary(max_size=400))
def test_decoders_never_raise(data: bytes) -> None:
    assert isinstance(decode_model_parameters(data), ModelParameters | Malformed)
    assert isinstance(decode_model_request(data), ModelRequest | Malformed)
    assert isinstance(decode_reply_head(data[:REPLY_HEAD]), ReplyHead | Malformed)
    assert isinstance(decode_offer(data), Offer | Malformed)
    assert isinstance(decode_preparing(data), Preparing | Malformed)
    assert isinstance(decode_model_refused(data), ModelRefused | Malformed)


@settings(max_examples=60)
@given(parameters=st.one_of(st.binary(max_size=60), st.just(encode(ASKED))), requests=st.lists(_requests, max_size=6))
def test_every_request_is_answered_or_its_stream_is_reset(
    tmp_path_factory: pytest.TempPathFactory,
    random_model: Callable[[str], Path],
    parameters: bytes,
    requests: list[bytes],
) -> None:
    model = random_model("small-draft")
    directory = tmp_path_factory.getbasetemp() / "given"

    async def run() -> None:
        giver = Seeder(
            lambda name, _: SeededModel((model,)) if name == "m" else None, ChunkDigestStore(directory), RateLimit(None)
        )
        here, there = BulkPipe.pair()

        async def read() -> None:
            while await here.read(1 << 20):
                pass

        async def ask() -> None:
            for request in requests:
                await here.write(frame(request))
            await here.finish()

        async with asyncio.timeout(30):
            ends = await asyncio.gather(giver.serve(there, NODE, parameters), ask(), read(), return_exceptions=True)
        await giver.close()
        assert all(end is None or isinstance(end, ConnectionError) for end in ends)

    asyncio.run(run())


@settings(max_examples=60)
@given(replies=st.lists(_replies, max_size=6))
def test_false_replies_of_a_seeder_leave_no_file(
    tmp_path_factory: pytest.TempPathFactory, replies: list[bytes]
) -> None:
    directory = tmp_path_factory.mktemp("taken")

    async def run() -> None:
        here, there = BulkPipe.pair()

        async def open_model(_node: NodeId, _parameters: bytes) -> BulkStream:
            return here

        async def say() -> None:
            for reply in replies:
                await there.write(reply)
            await there.finish()

        taking = ModelDownload(
            asked=ASKED,
            place=in_directory("m", directory),
            open_model=open_model,
            store=ChunkDigestStore(directory / "lists"),
            on_progress=lambda _: None,
            failed=lambda _node, _failure: None,
            most_bytes=1 << 30,
            silence=2.0,
        )
        async with asyncio.timeout(30):
            ends = await asyncio.gather(taking.run([NODE]), say(), return_exceptions=True)
        assert isinstance(ends[0], NoSeedersError)

    asyncio.run(run())
    assert not list(directory.glob("[!.]*.gguf"))
