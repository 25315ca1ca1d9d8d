"""What Ollama's clients learn of models, from announcements and files."""

import os
from pathlib import Path
from random import Random

from tests.support.core_values import config, facts, member
from tests.support.fake_peers import FakePeers
from tests.support.gguf_tool_caller import write_tool_caller

from mesh_llm.core.node import Node
from mesh_llm.core.types.events import Tick
from mesh_llm.core.types.ids import ModelName
from mesh_llm.daemon.model_registry import ModelRegistry
from mesh_llm.daemon.ollama import DescribedModels
from mesh_llm.models.library.library import FactsCache, scan


def described(directory: Path, *others: str) -> DescribedModels:
    peers = FakePeers()
    peers.set(member(2, on_disk=tuple(facts(name) for name in others)))
    node = Node(config(), Random(1), peers)
    node.handle(Tick(), 1.0)
    return DescribedModels(node, ModelRegistry(scan([directory], builtin=False), FactsCache()))


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
