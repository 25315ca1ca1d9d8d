"""The container's files fit together, and fit the program: what they name exists. `make container` executes them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.support.containerfile import Stage, only, read

from mesh_llm.cli.main import VERBS
from mesh_llm.cli.serve import serve

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "container" / "Containerfile"
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "container" / "compose.yaml").read_text())
VARIANTS: dict[str, dict[str, Any]] = COMPOSE["services"]
STATE = "/var/lib/mesh-llm"


def build() -> Stage:
    return read(FILE)[0]


def final() -> Stage:
    return read(FILE)[1]


def parse(words: list[str]) -> dict[str, Any]:
    with serve.make_context("mesh-llm serve", list(words)) as context:
        return context.params


def test_what_is_copied_exists() -> None:
    for stage in read(FILE):
        for copy in only(stage, "COPY"):
            *sources, _ = copy.words
            if "from" in copy.flags:
                assert copy.flags["from"] in {one.name for one in read(FILE)}
                continue
            assert all((ROOT / source).exists() for source in sources)


def test_what_a_build_names_of_this_checkout_exists() -> None:
    runs = " ".join(one.text for one in only(build(), "RUN"))
    files = re.findall(r"\brequirements/[\w.]+", runs)
    assert files
    assert all((ROOT / file).is_file() for file in files)
    assert runs.count("--require-hashes") == runs.count("--requirement"), "nothing without its hash"


def test_it_ends_as_an_ordinary_user_and_its_state_is_a_volume() -> None:
    names = [one.name for one in final().instructions]
    (user,) = only(final(), "USER")
    assert user.text == "mesh-llm"
    assert f"useradd --system --uid 10001 --user-group --home-dir {STATE}" in only(final(), "RUN")[0].text
    assert "RUN" not in names[names.index("USER") :]
    assert [one.text for one in only(final(), "VOLUME")] == [STATE]
    variables = dict(one.text.split("=", 1) for one in only(final(), "ENV"))
    assert variables["MESH_LLM_HOME"] == STATE
    assert variables["MESH_LLM_MODELS"].startswith(f"{STATE}/")


def test_its_commands_exist() -> None:
    assert only(final(), "ENTRYPOINT")[0].words == ["mesh-llm"]
    (command, *rest) = only(final(), "CMD")[0].words
    assert command == "serve"
    parse(rest)
    check = only(final(), "HEALTHCHECK")[0]
    program, verb = check.text.removeprefix("CMD ").strip('[]"').split('", "')
    assert program == "mesh-llm"
    assert verb in VERBS
    assert set(check.flags) == {"interval", "timeout", "start-period"}
    ports = {option.default for option in serve.params if option.name in {"api_port", "console_port"}}
    assert {int(word) for word in only(final(), "EXPOSE")[0].words} == ports


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_can_be_built_and_its_options_exist(variant: str) -> None:
    service = VARIANTS[variant]
    assert service["profiles"] == [variant]
    assert (ROOT / "container" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    known = set(re.findall(r"^ARG (\w+)", FILE.read_text(), re.MULTILINE))
    assert set(service["build"].get("args", {})) <= known
    command, *options = service["command"]
    assert command == "serve"
    kinds = {"cpu": "none", "nvidia": "cuda", "amd": "rocm", "vulkan": "vulkan"}
    assert parse(options)["gpu"] == kinds[variant]


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_variant_has_no_rights_and_time_for_its_answers(variant: str) -> None:
    service = VARIANTS[variant]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    (volume,) = service["volumes"]
    name, _, place = volume.partition(":")
    assert name in COMPOSE["volumes"]
    assert place == STATE
    drain = next(option.default for option in serve.params if option.name == "drain")
    assert isinstance(drain, float)
    assert int(service["stop_grace_period"].removesuffix("s")) >= drain + 20


def test_the_arguments_of_a_variant_reach_the_build() -> None:
    packages = VARIANTS["vulkan"]["build"]["args"]["PACKAGES"]
    stages = read(FILE, PACKAGES=packages, BASE="other:1")
    assert [stage.base for stage in stages] == ["other:1", "other:1"]
    assert packages in only(stages[1], "RUN")[0].text
