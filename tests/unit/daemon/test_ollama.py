"""What Ollama's clients learn of models, from announcements and files."""

import os
from pathlib import Path
from random import Random

import pytest
from tests.support.core_values import GB, config, facts, member
from tests.support.fake_peers import FakePeers
from tests.support.gguf_tool_caller import write_tool_caller

from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.placement.launches import Origin
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, DropRequested, ModelAwaited, Started, Tick
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity
from mesh_llm.daemon.model_registry import ModelRegistry
from mesh_llm.daemon.ollama import DescribedModels, pull_specs
from mesh_llm.models.library.library import FactsCache, Library, scan


def described(directory: Path, *others: str) -> DescribedModels:
    peers = FakePeers()
    peers.set(member(2, on_disk=tuple(facts(name) for name in others)))
    node = Node(config(), Random(1), peers)
    node.handle(Tick(), 1.0)
    return DescribedModels(node, ModelRegistry(scan([directory], builtin=False), FactsCache()), _nobody)


def _nobody(_: AnyEvent) -> None:
    raise AssertionError("nothing is posted")


def test_only_what_a_request_loaded_is_unloaded() -> None:
    node = Node(config("wanted", on_demand=OnDemandPolicy(scope="clients")), Random(1), FakePeers())
    posted: list[AnyEvent] = []
    models = DescribedModels(node, ModelRegistry(Library(), FactsCache()), posted.append)
    node.handle(Started(capacity=Capacity(memory_bytes=64 * GB), on_disk=(facts("wanted"), facts("asked"))), 1.0)
    node.handle(ModelAwaited(model=ModelName("asked"), asker=node.config.node, count=1), 2.0)
    node.handle(Tick(), 3.0)
    origins = {launch.model: launch.order.origin for launch in node.launches}
    assert origins == {"wanted": Origin.USER, "asked": Origin.DEMAND}
    for name in ("wanted", "nosuch", "asked"):
        models.unload(ModelName(name))
    assert [(type(event), getattr(event, "model", "")) for event in posted] == [(DropRequested, "asked")]


async def test_files_here_and_announced_ones(tmp_path: Path) -> None:
    write_tool_caller(tmp_path / "caller.gguf")
    os.utime(tmp_path / "caller.gguf", (5.0, 5.0))
    models = described(tmp_path, "there", "caller")
    assert models.facts().keys() == {"there", "caller"}
    assert models.facts()["caller"].layers == 1
    assert models.modified() == {"caller": 5.0}
    assert models.gpu is False

    found = await models.metadata(ModelName("caller"), arrays=False)
    assert found["general.architecture"] == "llama"
    assert found["tokenizer.ggml.fim_mid_token_id"] == 3
    assert found["tokenizer.ggml.tokens"] == []
    count = found["general.parameter_count"]
    assert isinstance(count, int)
    assert count > 1000
    assert await models.metadata(ModelName("there"), arrays=False) == {}
    (tmp_path / "caller.gguf").write_bytes(b"GGUF")
    assert await models.metadata(ModelName("caller"), arrays=True) == {}


@pytest.mark.parametrize(
    ("name", "specs"),
    [
        ("llama3.2:3b", ["llama3.2-3b", "llama-3.2-3b"]),
        ("qwen3-8b:latest", ["qwen3-8b", "qwen-3-8b"]),
        ("tiny", ["tiny"]),
        ("hf.co/owner/repo-GGUF:Q4_K_M", ["hf:owner/repo-GGUF:Q4_K_M"]),
        ("huggingface.co/owner/repo:latest", ["hf:owner/repo"]),
        ("hf:owner/repo:Q8_0", ["hf:owner/repo:Q8_0"]),
    ],
)
def test_names_to_pull(name: str, specs: list[str]) -> None:
    assert pull_specs(name) == specs


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x", "./x", "~/x", "a/b", "x.gguf", "http://127.0.0.1/x", "https://huggingface.co/a/b",
     "hf:a/../b", "hf.co/a/b/c", "file:///x", "a\\b", "", "hf.co/a/b:Q4/../x"],
)  # fmt: skip
def test_a_name_to_pull_is_no_path_and_no_address(name: str) -> None:
    with pytest.raises(MeshError, match="pull model manifest"):
        pull_specs(name)
