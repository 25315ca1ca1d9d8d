"""An engine with a projector: no URL reaches it, nor a prompt that ends with a picture; it starts no program."""

import asyncio
import base64
import contextlib
import json
import os
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.engine_fixtures import Model, client_of, embedded, model, small_spec, started, supervisor
from tests.support.api_harness import THERE, local, peer_streams, route, running_api
from tests.support.gguf_writer import Tensor, write
from tests.support.http import HttpClient, TruncatedError

from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import RunningEngine, Supervisor

__all__ = ["embedded", "model", "supervisor"]

WIDTH, PATCH, SIDE = 32, 14, 28


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG = (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    + _chunk(b"IDAT", zlib.compress((b"\0" + b"\x80" * 3 * SIDE) * SIDE))
    + _chunk(b"IEND", b"")
)
DATA = base64.b64encode(PNG).decode()

PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n#EXT-X-ENDLIST\n"


def write_projector(path: Path, text_width: int) -> None:
    """A projector of LLaVA's kind, all of it zeros: a picture becomes 4 empty tokens."""
    vision = {
        "embedding_length": WIDTH,
        "attention.head_count": 2,
        "feed_forward_length": WIDTH,
        "block_count": 1,
        "projection_dim": text_width,
        "attention.layer_norm_epsilon": 1e-5,
        "image_size": SIDE,
        "patch_size": PATCH,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    }
    facts = {"general.architecture": "clip", "clip.projector_type": "mlp", "clip.has_vision_encoder": True}
    square = ("attn_q", "attn_k", "attn_v", "attn_out", "ffn_up", "ffn_down")
    write(
        path,
        facts | {f"clip.vision.{name}": value for name, value in vision.items()},
        [
            Tensor("v.patch_embd.weight", (PATCH, PATCH, 3, WIDTH)),
            Tensor("v.position_embd.weight", (WIDTH, (SIDE // PATCH) ** 2), "f32"),
            *(Tensor(f"v.blk.0.{name}.weight", (WIDTH, WIDTH)) for name in square),
            Tensor("mm.0.weight", (WIDTH, text_width)),
            Tensor("mm.0.bias", (text_width,), "f32"),
            Tensor("mm.2.weight", (text_width, text_width)),
            Tensor("mm.2.bias", (text_width,), "f32"),
        ],
    )


class Listener:
    """A server of the local network, which is not to be reached."""

    def __init__(self) -> None:
        self.seen = 0
        self.url = ""

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b" % (len(PNG), PNG))
        writer.close()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    listener = Listener()
    server = await asyncio.start_server(listener.answer, "127.0.0.1", 0)
    async with server:
        listener.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/picture.png"
        yield listener


@pytest.fixture
async def engine(supervisor: Supervisor, embedded: EmbeddedSource, model: Model, tmp_path: Path) -> RunningEngine:
    write_projector(tmp_path / "projector.gguf", 256)
    spec = small_spec(model("small"), mmproj=tmp_path / "projector.gguf")
    return await started(supervisor, embedded, spec, "sees")


def bodies(place: str) -> dict[str, dict[str, Any]]:
    """A question about a picture by the path it is asked at."""
    source = (
        {"type": "url", "url": place}
        if place.startswith("http")
        else {"type": "base64", "media_type": "image/png", "data": DATA}
    )
    picture, question = {"type": "image_url", "image_url": {"url": place}}, {"type": "text", "text": "what is it?"}
    chat = [{"role": "user", "content": [picture, question]}]
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": place}]}]
    blocks = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    return {
        "/v1/chat/completions": {"messages": chat, "max_tokens": 2},
        "/v1/responses": {"input": items, "max_output_tokens": 2},
        "/v1/messages": {"messages": blocks, "max_tokens": 2},
        "/v1/messages/count_tokens": {"messages": blocks},
        "/apply-template": {"messages": chat},
        "/v1/embeddings": {"input": chat[0]},
    }


async def test_no_url_of_a_request_makes_an_engine_connect(engine: RunningEngine, listener: Listener) -> None:
    assert engine.info is not None
    async with running_api([route("small", local(engine.info.address))], key=engine.info.key) as api:
        for path, body in bodies(listener.url).items():
            answer = await api.post(json.dumps(body).encode(), path)
            assert answer.status_code == 400, path
            assert "data: URL" in answer.json()["error"]["message"]
            async with peer_streams(api.server, THERE) as address:
                peer = HttpClient(int(address.rpartition(":")[2]))
                told = await peer.post(path, body, headers={"x-mesh-llm-model": "small"})
                assert (told.status, told.headers["x-mesh-llm-error"]) == (400, "media_not_in_request"), path
        assert listener.seen == 0
        assert api.traffic.begun == []
        for path, body in bodies(f"data:image/png;base64,{DATA}").items():
            answer = await api.post(json.dumps(body).encode(), path)
            assert answer.status_code == 200, (path, answer.text)
    # Without the door the engine does fetch it, from every path.
    for number, (path, body) in enumerate(bodies(listener.url).items(), start=1):
        await client_of(engine).post(path, body)
        assert listener.seen == number, path


async def test_a_prompt_that_ends_with_a_picture_ends_the_engine_and_is_refused_before_it(
    engine: RunningEngine,
) -> None:
    assert engine.info is not None
    picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{DATA}"}}
    marker = (await client_of(engine).get("/props")).json()["media_marker"]
    marked = {"prompt_string": f"x{marker}", "multimodal_data": [DATA]}
    async with running_api([route("small", local(engine.info.address))], key=engine.info.key) as api:
        for entry in (
            {"content": [picture]},
            {"role": "user", "content": [picture, {"type": "text", "text": ""}]},
            marked,
        ):
            answer = await api.post(json.dumps({"input": entry}).encode(), "/v1/embeddings")
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_complex")
        assert engine.running
    # Without the door, it does.
    with contextlib.suppress(OSError, TruncatedError):
        await client_of(engine).post("/v1/embeddings", {"input": {"content": [picture]}})
    assert (await engine.wait()).end is EngineEnd.CRASHED


async def test_what_is_no_picture_starts_no_program(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine hands what it cannot read to ffprobe and ffmpeg, which follow the addresses in a playlist."""
    seen = tmp_path / "seen"
    for name in ("ffprobe", "ffmpeg"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho {name} >> {seen}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    write_projector(tmp_path / "projector.gguf", 256)
    spec = small_spec(model("small"), mmproj=tmp_path / "projector.gguf")
    engine = await started(supervisor, embedded, spec, "sees")
    for kind, data in (("image", PLAYLIST), ("video", PLAYLIST), ("image", b"RIFF\x10\0\0\0WEBPVP8 \0\0\0\0")):
        place = f"data:{kind}/x;base64,{base64.b64encode(data).decode()}"
        part: dict[str, Any] = {"type": f"{kind}_url", f"{kind}_url": {"url": place}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
        answer = await client_of(engine).post("/v1/chat/completions", body)
        assert answer.status in {400, 500}
    assert not seen.exists()


def heard_or_seen(kind: str, encoding: str) -> dict[str, dict[str, Any]]:
    """A question about a sound or a video, by the path it is asked at."""
    part = {"type": f"input_{kind}", f"input_{kind}": {"data": DATA, "format": encoding}}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "what is it?"}]}]
    return {"/v1/chat/completions": {"messages": chat, "max_tokens": 2}, "/apply-template": {"messages": chat}}


@pytest.mark.parametrize("stream", [False, True])
async def test_media_for_a_model_that_reads_text_are_the_requests_fault(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, stream: bool
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "reads")
    assert engine.info is not None
    marked = {"prompt_string": "x", "multimodal_data": [DATA]}
    asked = [("image", *item) for item in bodies(f"data:image/png;base64,{DATA}").items()]
    asked += [("audio", *item) for item in heard_or_seen("audio", "wav").items()]
    asked += [("video", *item) for item in heard_or_seen("video", "mp4").items()]
    asked += [
        ("multimodal", "/v1/completions", {"prompt": marked}),
        ("multimodal", "/v1/embeddings", {"input": marked}),
    ]
    async with running_api([route("small", local(engine.info.address))], key=engine.info.key) as api:
        for kind, path, body in asked:
            answer = await api.post(json.dumps(body | {"stream": stream}).encode(), path)
            error = answer.json()["error"]
            assert (answer.status_code, error["type"]) == (400, "invalid_request_error"), (path, answer.text)
            assert error["message"].startswith(f"{kind} input is not supported")
            if not path.startswith("/v1/messages"):
                assert error["code"] == "media_not_supported"
    # Without the door most paths call it a fault of the server.
    bare = await client_of(engine).post(*next(iter(bodies(f"data:image/png;base64,{DATA}").items())))
    assert bare.status == 500
