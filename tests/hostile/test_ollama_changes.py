"""The paths of Ollama that change this machine's disk: the node's user may, others and odd names change nothing."""

import asyncio
import hashlib
import importlib
import json
import urllib.error
import urllib.request
from pathlib import Path

import ollama
import pytest
from tests.support.fixtures import StartNode
from tests.support.gguf_tool_caller import write_tool_caller
from tests.support.other_user import as_nobody

pytestmark = pytest.mark.timeout(180)

# Another user may not be able to read this interpreter's files: load what it needs before.
importlib.import_module("encodings.idna")

ODD = ("../own", "/etc/passwd", "~/own", "./own.gguf", "own.gguf", "a/../own", "..", "a\\..\\own", "o\u0000wn")


def tries(port: int, digest: str) -> str:
    """What another user gets for every change, and for a question."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    found: list[str] = []
    for method, path, body in (
        ("DELETE", "delete", {"model": "own"}),
        ("POST", "copy", {"source": "tiny", "destination": "theirs"}),
        ("POST", "create", {"model": "theirs", "from": "tiny"}),
        ("POST", "pull", {"model": "tiny"}),
        ("POST", f"blobs/{digest}", {}),
        ("POST", "show", {"model": "tiny"}),
    ):
        url = f"http://127.0.0.1:{port}/api/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), method=method)
        try:
            with opener.open(request, timeout=20) as answer:
                found.append(str(answer.status))
        except urllib.error.HTTPError as error:
            found.append(str(error.code))
    return " ".join(found)


async def test_only_the_nodes_user_changes_its_models(start_node: StartNode, tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write_tool_caller(models / "own.gguf")
    data = (models / "own.gguf").read_bytes()
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    node = await start_node("a", models=["tiny"], env={"MESH_LLM_MODELS": str(models)})
    port = node.api.port

    assert await asyncio.to_thread(as_nobody, lambda: tries(port, digest)) == "403 403 403 403 403 200"
    page = {"origin": "http://localhost:5173"}
    refused = await node.api.request("DELETE", "/api/delete", json={"model": "own"}, headers=page)
    assert refused.status == 403
    for name in ODD:
        for method, path, body in (
            ("DELETE", "delete", {"model": name}),
            ("POST", "copy", {"source": "own", "destination": name}),
            ("POST", "copy", {"source": name, "destination": "theirs"}),
            ("POST", "pull", {"model": name, "stream": False}),
            ("POST", "create", {"model": name, "from": "own", "stream": False}),
        ):
            answer = await node.api.request(method, f"/api/{path}", json=body)
            assert 400 <= answer.status < 500, (path, body)
    assert [path.name for path in models.rglob("*")] == ["own.gguf"]
    assert (models / "own.gguf").read_bytes() == data

    async with ollama.AsyncClient(f"http://127.0.0.1:{port}") as client:
        with pytest.raises(ollama.ResponseError, match="digest mismatch"):
            await _upload(client, digest, b"else")
        assert await client.create_blob(models / "own.gguf") == digest
        steps = [step.status async for step in await client.create("mine:v1", files={"x.gguf": digest}, stream=True)]
        assert steps[-1] == "success"
        assert (models / "created" / "mine-v1.gguf").read_bytes() == data
        shown = await client.show("mine:v1")
        assert shown.modelinfo is not None
        assert shown.modelinfo["general.architecture"] == "llama"
        assert (await client.copy("mine:v1", "another")).status == "success"
        with pytest.raises(ollama.ResponseError, match="called another already"):
            await client.create("another", from_="mine:v1")
        for name in ("mine:v1", "another"):
            assert (await client.delete(name)).status == "success"
        for name, reason in (("tiny", "being served"), ("own", "did not fetch it"), ("mine:v1", "not found")):
            with pytest.raises(ollama.ResponseError, match=reason):
                await client.delete(name)
        done = await client.pull("tiny")
        assert done.status == "success"
    assert [path.name for path in models.rglob("*.gguf")] == ["own.gguf"]
    await node.stop()


async def _upload(client: ollama.AsyncClient, digest: str, data: bytes) -> None:
    """Upload bytes under a digest that is not theirs."""
    await client._request_raw("POST", f"/api/blobs/{digest}", content=data)  # pyright: ignore[reportPrivateUsage]
