"""The verbs about models, as processes, against a hub on loopback."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from tests.support.gguf_writer import header, llama_metadata, llama_tensors
from tests.support.hub_server import Fault, HubServer

QWEN = ("unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf")
DRAFT = ("unsloth/Qwen3-0.6B-GGUF", "Qwen3-0.6B-Q4_K_M.gguf")


def content(width: int, megabytes: int = 0) -> bytes:
    """A model's file; bytes behind the tensors make it as large as is wanted."""
    head, size = header(llama_metadata(width=width), llama_tensors(width=width))
    return head + os.urandom(size - len(head)) + bytes(megabytes << 20)


@pytest.fixture
def hub() -> Generator[HubServer]:
    with HubServer() as server:
        server.add(*QWEN, content(512))
        server.add(*DRAFT, content(128))
        yield server


class Desk:
    """Somebody's machine: its directories, and the command."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.models = folder / "models"
        self.models.mkdir()
        self.cache = folder / "hugging-face" / "hub"
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("MESH_LLM_", "HF_"))},
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "hugging-face"),
            "HOME": str(folder),
            "MESH_LLM_HOME": str(folder / "home"),
            "MESH_LLM_MODELS": str(self.models),
        }

    def start(self, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-m", "mesh_llm", *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(argv, env=self.environment, text=True, **pipes)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def run(self, *words: str) -> tuple[int, str, str]:
        process = self.start(*words)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def json(self, *words: str) -> Any:
        status, out, err = self.run(*words, "--json")
        assert status == 0, err
        return json.loads(out)


@pytest.fixture
def desk(hub: HubServer, tmp_path: Path) -> Desk:
    return Desk(hub, tmp_path)


def test_a_model_and_its_draft_are_fetched_listed_checked_and_removed(desk: Desk, hub: HubServer) -> None:
    status, out, err = desk.run("download", "Qwen3-8B", "--draft")
    assert status == 0, err
    assert "Qwen3-8B-Q4_K_M: " in out
    assert "Serve it: mesh-llm --model Qwen3-8B-Q4_K_M" in out
    assert "Qwen3-8B-Q4_K_M: checked " in err
    assert "Qwen3-0.6B-Q4_K_M: " in err
    fetched = hub.content_bytes()
    _, again, _ = desk.run("download", "qwen3-8b")
    assert "already here" in again
    assert hub.content_bytes() == fetched

    found = {one["name"]: one for one in desk.json("models", "list")["models"]}
    assert found["Qwen3-8B-Q4_K_M"]["store"] == "Hugging Face"
    assert found["Qwen3-8B-Q4_K_M"]["draft"] == "Qwen3-0.6B-Q4_K_M"
    shown = desk.json("models", "show", "qwen3-8b")
    assert str(shown["source"]).startswith("hf:unsloth/Qwen3-8B-GGUF:Qwen3-8B-Q4_K_M.gguf@")

    _, said, _ = desk.run("models", "verify", "Qwen3-8B")
    assert "ok: as published" in said
    path = Path(shown["paths"][0]).resolve()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    status, said, _ = desk.run("models", "verify", "Qwen3-8B")
    assert (status, "FAIL: its content is not what was published" in said) == (1, True)

    status, _, err = desk.run("models", "rm", "Qwen3-8B")
    assert (status, "--yes" in err) == (1, True)
    assert path.exists()
    assert desk.json("models", "rm", "Qwen3-8B", "--yes") == {"removed": "Qwen3-8B-Q4_K_M", "bytes": len(data)}
    assert not path.exists()
    assert [folder.name for folder in desk.cache.glob("models--*")] == ["models--unsloth--Qwen3-0.6B-GGUF"]


def test_what_is_not_ours_is_not_removed(desk: Desk) -> None:
    (desk.models / "mine.gguf").write_bytes(content(128))
    for name, why in (("mine", "mesh-llm did not fetch it"), ("tiny", "it is part of mesh-llm")):
        status, _, err = desk.run("models", "rm", name, "--yes")
        assert (status, why in err) == (1, True), err
    assert (desk.models / "mine.gguf").exists()


def test_interrupted_and_resumed(desk: Desk, hub: HubServer) -> None:
    size = len(hub.repositories[QWEN[0]].files[QWEN[1]].data)
    slow = hub.faults["/".join(QWEN)] = Fault(bytes_per_second=400_000)
    for number in (signal.SIGINT, signal.SIGKILL):
        process = desk.start("download", "qwen3-8b")
        assert process.stderr is not None
        assert any(line.startswith("Qwen3-8B-Q4_K_M:") for line in process.stderr)
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
        assert process.returncode == (130 if number is signal.SIGINT else -number)
        assert ("What has arrived is kept" in said) == (number is signal.SIGINT)
        names = [one["name"] for one in desk.json("models", "list")["models"]]
        assert "Qwen3-8B-Q4_K_M" not in names
    slow.bytes_per_second = 0
    status, out, err = desk.run("download", "qwen3-8b")
    assert (status, "fetched" in out) == (0, True), err
    assert (desk.cache / "models--unsloth--Qwen3-8B-GGUF").exists()
    assert hub.content_bytes() <= 3 * size


def test_choices_and_searching(desk: Desk, hub: HubServer) -> None:
    status, _, err = desk.run("download", "32b")
    assert status == 1
    assert "qwen3-32b" in err
    status, _, err = desk.run("download", "nothing-like-it")
    assert (status, "hf:OWNER/REPO" in err) == (1, True)
    status, _, err = desk.run("download", "hf:no/where")
    assert (status, "no repository" in err) == (1, True)
    found = desk.json("models", "search", "qwen3", "8b")
    assert found["hub"] == [
        {"repository": QWEN[0], "downloads": 0, "likes": 0, "gated": False},
    ]
    assert "qwen3-8b" in [one["name"] for one in found["catalogue"]]
    remote = desk.json("models", "show", f"hf:{QWEN[0]}")
    assert [one["name"] for one in remote["models"]] == ["Qwen3-8B-Q4_K_M"]


def test_the_catalogue_says_what_fits_here(desk: Desk) -> None:
    answer = desk.json("download")
    listed = answer["models"]
    sizes = [one["size_bytes"] for one in listed]
    assert sizes == sorted(sizes)
    fits = {one["name"]: one["fits"] for one in listed}
    assert answer["memory_bytes"]
    assert fits["qwen2.5-0.5b"] == "here"
    status, out, _ = desk.run("download")
    assert status == 0
    assert "qwen3-32b" in out
    assert "Memory for models: " in out


def test_what_was_begun_and_not_ended_is_cleaned_up(desk: Desk, hub: HubServer) -> None:
    hub.faults["/".join(QWEN)] = Fault(bytes_per_second=400_000)
    process = desk.start("download", "qwen3-8b")
    assert process.stderr is not None
    assert any(line.startswith("Qwen3-8B-Q4_K_M:") for line in process.stderr)
    # While it goes on, it is left alone.
    answer = desk.json("models", "clean", "--yes")
    assert (answer["removed"], len(answer["going_on"])) == ([], 1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    own = desk.models / ".mine.gguf.mesh-llm.incomplete"
    for path in (own, own.with_name(own.name + ".journal"), desk.models / ".other.gguf.incomplete"):
        path.write_bytes(b"x" * 5000)
    status, _, err = desk.run("models", "clean")
    assert (status, "--yes" in err, own.exists()) == (1, True, True)
    status, out, err = desk.run("models", "clean", "--yes")
    assert status == 0, err
    assert "Removed unsloth/Qwen3-8B-GGUF, " in out
    assert f"Removed {desk.models / 'mine.gguf'}: " in out
    # What another program left is its own.
    assert [path.name for path in desk.models.iterdir()] == [".other.gguf.incomplete"]
    assert not list((desk.cache / "models--unsloth--Qwen3-8B-GGUF" / "blobs").iterdir())
    assert desk.run("models", "clean", "--yes")[1] == "There is nothing to remove.\n"


def test_a_model_is_planned_before_it_is_fetched(desk: Desk, hub: HubServer) -> None:
    # What the catalogue has needs no hub: this one is too large for any machine that runs tests.
    asked = len(hub.asked)
    plan = desk.json("plan", "llama-3.3-70b", "--ctx-size", "512")
    assert plan["size_bytes"] > 40e9
    assert plan["on_disk"] is False
    assert len(hub.asked) == asked
    small = desk.json("plan", "qwen2.5-0.5b", "--ctx-size", "512")
    assert (small["runs"], "mesh-llm download qwen2.5-0.5b" in small["hint"]) == ("here", True)
    # Of any other the header is read from the hub, and nothing else.
    hub.add("o/Big-GGUF", "Big-Q8_0.gguf", content(512, megabytes=200))
    before = hub.content_bytes()
    plan = desk.json("plan", "hf:o/Big-GGUF", "--ctx-size", "512")
    assert (plan["model"], plan["runs"], plan["on_disk"]) == ("Big-Q8_0", "here", False)
    assert hub.content_bytes() - before < 20 << 20
    status, _, err = desk.run("plan", "nothing-like-it")
    assert (status, "No model called nothing-like-it" in err) == (1, True)


def test_without_the_hub_a_catalogue_model_is_shown_as_the_catalogue_has_it(desk: Desk, hub: HubServer) -> None:
    hub.instead = b"<html>Sign in</html>"
    status, out, err = desk.run("models", "show", "qwen3-32b")
    assert (status, err) == (0, "")
    assert "This is what the catalogue says." in out
    assert "layers" in out
    assert desk.json("models", "show", "qwen3-32b")["entry"]["name"] == "qwen3-32b"
    assert desk.run("models", "show", "hf:o/x")[0] == 1
