"""What a model is for is read from its file: it is served as that, and refused for anything else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.integration.daemon_support import chat, state, until
from tests.support.fixtures import StartNode
from tests.support.gguf_encoder import write_encoder
from tests.support.gguf_models import PRESETS, write_model
from tests.support.gguf_writer import Tensor, write
from tests.support.node import NodeProcess

WORDS = "the mesh of the node is in the model "


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    write_encoder(folder / "embedder.gguf", gguf.PoolingType.MEAN)
    write_encoder(folder / "ranker.gguf", gguf.PoolingType.RANK)
    return folder


async def ask(node: NodeProcess, path: str, **body: Any) -> tuple[int, Any]:
    answer = await node.api.post(path, body)
    return answer.status, answer.json()


async def test_embedders_and_rerankers_serve_their_purpose_and_refuse_others(
    start_node: StartNode, models: Path
) -> None:
    node = await start_node("a", models=["tiny"], arguments=["--models-dir", str(models)])
    for name in ("embedder", "ranker"):
        status, text = await node.cli("load", name)
        assert status == 0, text
        await until(node, lambda status, name=name: state(status, name) == "warm")

    # A text far longer than llama.cpp's usual batch of 512 tokens, within the announced context.
    long = WORDS * 200
    status, answer = await ask(node, "/v1/embeddings", model="embedder", input=[long, "token"])
    assert status == 200, answer
    assert [len(one["embedding"]) for one in answer["data"]] == [128, 128]
    assert answer["usage"]["prompt_tokens"] > 1500

    # A model for text embeds too, as much as it computes at once, and says how much that is.
    status, answer = await ask(node, "/v1/embeddings", model="tiny", input=long)
    assert (status, answer["error"]["code"]) == (400, "input_too_long"), answer
    assert "takes at most 512 in one" in answer["error"]["message"]

    documents = ["the mesh", "token model", long]
    status, answer = await ask(node, "/v1/rerank", model="ranker", query="mesh", documents=documents)
    assert status == 200, answer
    assert sorted(one["index"] for one in answer["results"]) == [0, 1, 2]

    wrong = [
        ("/v1/chat/completions", chat(model="embedder"), "/v1/embeddings"),
        ("/v1/completions", {"model": "ranker", "prompt": "x"}, "/v1/rerank"),
        ("/v1/messages", {"max_tokens": 4, **chat(model="ranker")}, "/v1/rerank"),
        ("/v1/embeddings", {"model": "ranker", "input": "x"}, "/v1/rerank"),
        ("/v1/rerank", {"model": "embedder", "query": "x", "documents": ["y"]}, "/v1/embeddings"),
        ("/v1/rerank", {"model": "tiny", "query": "x", "documents": ["y"]}, "/v1/chat/completions"),
    ]
    for path, body, where in wrong:
        status, answer = await ask(node, path, **body)
        assert status == 400, (path, answer)
        assert where in str(answer), (path, answer)


async def test_a_client_node_knows_the_purpose_too(start_node: StartNode, models: Path) -> None:
    host = await start_node("a", models=[models / "ranker.gguf"])
    client = await start_node("b", client=True, join=[await host.invite()])
    status, answer = await ask(client, "/v1/rerank", model="ranker", query="mesh", documents=["mesh", "node"])
    assert status == 200, answer
    status, answer = await ask(client, "/v1/chat/completions", **chat(model="ranker"))
    assert (status, "only ranks documents" in str(answer)) == (400, True)


async def test_a_projector_that_does_not_fit_is_set_aside(start_node: StartNode, tmp_path: Path) -> None:
    """It has the model's width and lies beside it, and its name speaks of no model."""
    folder = tmp_path / "mine"
    folder.mkdir()
    write_model(folder / "text.gguf", PRESETS["small"])
    clip = {"general.architecture": "clip", "clip.projector_type": "mlp", "clip.vision.projection_dim": 256}
    write(folder / "mmproj-model-f16.gguf", clip, [Tensor("v.patch_embd.weight", (64, 64))])
    node = await start_node("a", models=["text"], arguments=["--models-dir", str(folder)])
    assert (await node.api.post("/v1/chat/completions", chat(model="text", max_tokens=2))).status == 200
    assert "so it is served without: no images." in node.process.text
    await node.stop()
    node.options = replace(node.options, arguments=[*node.options.arguments, "--no-mmproj"])
    await node.restart()
    assert (await node.api.post("/v1/chat/completions", chat(model="text", max_tokens=2))).status == 200
    assert "served without" not in node.process.text
