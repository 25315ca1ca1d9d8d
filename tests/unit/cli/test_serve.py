"""What a node that is ready says on its terminal."""

import msgspec

from mesh_llm.cli.serve import next_steps
from mesh_llm.console.status import Status, StatusModel

STATUS = Status(
    version="1", node_id="a" * 64, mesh_id="b" * 64, mesh_name="lab", name="desk", role="serve", ready=True,
    health="ready", api_port=9337, api_base="http://localhost:9337/v1", token="", uptime_s=1.0, pid=7, home="h",
    memory_bytes=8_000_000_000, memory_total_bytes=16_000_000_000, devices=("CPU",), engine="embedded 1",
    models=(StatusModel(name="tiny", status="warm"),), peers=(),
)  # fmt: skip


def test_without_keys_what_is_shown_has_none() -> None:
    text = "\n".join(next_steps(STATUS, ""))
    assert "OPENAI_API_KEY=none" in text
    assert "authorization" not in text
    assert "Ollama" not in text


def test_where_requests_need_a_key_what_is_shown_has_a_place_for_it() -> None:
    text = "\n".join(next_steps(msgspec.structs.replace(STATUS, needs_key=True), ""))
    assert "    -H 'authorization: Bearer KEY' \\\n    -d '{" in text
    assert "OPENAI_API_KEY=KEY\n  (KEY is one of this node's API keys)" in text


def test_the_address_for_clients_of_ollama_is_shown() -> None:
    text = "\n".join(next_steps(msgspec.structs.replace(STATUS, ollama_base="http://localhost:11434"), ""))
    assert "API      http://localhost:9337/v1   model tiny\nOllama   http://localhost:11434\n" in text
