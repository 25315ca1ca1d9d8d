"""A node that is told of no model: what it offers, and what it falls back to; and models in other programs' stores."""

import hashlib
import json
from collections.abc import Callable, Generator
from pathlib import Path

import pytest
from tests.integration.daemon_support import chat, state, until
from tests.support.fixtures import StartNode
from tests.support.hub_server import HubServer

from mesh_llm.models.hub.catalog import CatalogEntry, recommend

RandomModel = Callable[[str], Path]
MEMORY = ("--max-vram", "1.5")


@pytest.fixture
def best() -> CatalogEntry:
    """What the catalogue has for a machine of the nodes' size."""
    entry = recommend(1_500_000_000)
    assert entry is not None
    return entry


@pytest.fixture
def hub(best: CatalogEntry, random_model: RandomModel) -> Generator[HubServer]:
    with HubServer() as server:
        server.add(best.repository, best.file, random_model("small").read_bytes())
        yield server


async def test_yes_fetches_and_serves_the_best_for_this_machine(
    start_node: StartNode, hub: HubServer, best: CatalogEntry
) -> None:
    node = await start_node("a", arguments=(*MEMORY, "--yes"), env={"HF_ENDPOINT": hub.endpoint})
    assert state(await node.status(), best.stem) == "warm"
    assert hub.content_bytes() > 0
    sent = hub.content_bytes()
    await node.stop()
    # It is on the disk now: nobody is asked, neither the user nor the hub.
    asked = len(hub.asked)
    again = await start_node("a", arguments=MEMORY, env={"HF_ENDPOINT": hub.endpoint})
    assert f"Serving {best.stem}: the best of the catalogue for this machine, and it is on disk." in again.process.text
    assert (hub.content_bytes(), len(hub.asked)) == (sent, asked)


async def test_without_a_yes_or_a_hub_it_serves_what_there_is_and_says_so(
    start_node: StartNode, hub: HubServer, best: CatalogEntry, random_model: RandomModel, tmp_path: Path
) -> None:
    # Nobody is at a terminal, so nobody agrees to a download.
    quiet = await start_node("a", arguments=MEMORY, env={"HF_ENDPOINT": hub.endpoint})
    text = (
        f"Serving tiny, which only shows that everything works. Better for this machine: mesh-llm --model {best.name}"
    )
    assert text in quiet.process.text
    assert not hub.asked
    own = tmp_path / "b" / "models" / "mine.gguf"
    own.parent.mkdir(parents=True)
    own.write_bytes(random_model("small").read_bytes())
    node = await start_node("b", arguments=(*MEMORY, "--yes"), env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert f"{best.name} cannot be fetched: " in node.process.text
    assert "Serving mine, the best on this machine's disk." in node.process.text
    assert state(await node.status(), "mine") == "warm"


async def test_other_programs_stores_are_served_from_and_left_as_they_are(
    start_node: StartNode, random_model: RandomModel, tmp_path: Path
) -> None:
    data = random_model("small").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    ollama, home = tmp_path / "ollama", tmp_path / "home"
    blob = ollama / "blobs" / f"sha256-{digest}"
    manifest = ollama / "manifests" / "registry.ollama.ai" / "library" / "llama3.2" / "3b"
    studio = home / ".lmstudio" / "models" / "somebody" / "Words-GGUF" / "words-q8.gguf"
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}"}
    for path, content in (
        (blob, data),
        (manifest, json.dumps({"layers": [layer]}).encode()),
        (studio, data + b"\0"),
    ):
        path.parent.mkdir(parents=True)
        path.write_bytes(content)

    def look() -> dict[Path, tuple[int, int]]:
        files = [*ollama.rglob("*"), *(home / ".lmstudio").rglob("*")]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = look()
    env = {"OLLAMA_MODELS": str(ollama), "HOME": str(home)}
    node = await start_node("a", models=["llama3.2:3b", "words-q8"], env=env)
    status, text = await node.cli("load", "words-q8")
    assert status == 0, text
    await until(node, lambda status: state(status, "words-q8") == "warm")
    for name in ("llama3.2:3b", "words-q8"):
        answer = (await node.api.post("/v1/chat/completions", chat(model=name))).expect().json()
        assert answer["model"] == name
        status, text = await node.cli("models", "rm", name, "--yes")
        assert status == 1, text
    _, text = await node.cli("models", "list")
    assert "Ollama" in text
    assert "LM Studio" in text
    assert look() == before


async def test_a_request_fetches_a_model_of_the_catalogue_where_that_is_allowed(
    start_node: StartNode, hub: HubServer, best: CatalogEntry
) -> None:
    env = {"HF_ENDPOINT": hub.endpoint}
    founder = await start_node("a", models=["tiny"], arguments=(*MEMORY, "--no-fetch"), env=env)
    assert (await founder.api.post("/v1/chat/completions", chat(model=best.stem))).status == 404
    assert not hub.asked
    joiner = await start_node(
        "b", models=["tiny"], arguments=(*MEMORY, "--fetch-on-demand"), join=[await founder.invite()], env=env
    )
    answer = (await joiner.api.post("/v1/chat/completions", chat(model=best.stem))).expect().json()
    assert answer["model"] == best.stem
    sent = hub.content_bytes()
    assert sent > 0
    # It is a model of the mesh now.
    answer = (await founder.api.post("/v1/chat/completions", chat(model=best.stem))).expect().json()
    assert answer["model"] == best.stem
    assert hub.content_bytes() == sent
