"""`mesh-llm config` without a node."""

import json
import os
import tomllib
from pathlib import Path

import jsonschema_rs
import pytest
from click.testing import CliRunner

from mesh_llm.cli.config import config
from mesh_llm.cli.config_text import config_schema, template_text
from mesh_llm.cli.configuration import OPTIONS, check_file
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.model_tables import FIELDS
from mesh_llm.runtime.config_file import SYSTEM_VARIABLE, parse_config, user_path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("MESH_LLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path))
    monkeypatch.setenv(SYSTEM_VARIABLE, str(tmp_path / "system.toml"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def run(*words: str) -> str:
    done = CliRunner().invoke(config, list(words), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def editor(home: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """An editor that does this to the file `$1`."""
    program = home / "editor"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("EDITOR", str(program))


def uncommented(text: str) -> str:
    """The file with every example in effect, and without the explanations."""
    lines = [line.removeprefix("# ") for line in text.splitlines()]
    return "\n".join(
        line
        for line in lines
        if line.startswith("[")
        or (" = " in line and line.split(" = ")[0].strip('"').replace("-", "").replace("*", "").isalnum())
    )


def test_init_explains_everything_and_sets_nothing() -> None:
    assert "Wrote" in run("init")
    text = user_path().read_text()
    assert tomllib.loads(text) == {}
    assert user_path().stat().st_mode & 0o777 == 0o600
    for key in OPTIONS:
        assert f"\n# {key} = " in text
    for field in FIELDS:
        assert field in text
    with pytest.raises(MeshError, match="already"):
        run("init")
    assert "no errors" in run("check")


def test_every_example_of_the_file_is_right() -> None:
    text = uncommented(template_text())
    text = text.replace('chat-template = "@~/my.jinja"', "").replace('console-origin = ["URL"]', "")
    found = tomllib.loads(text)
    assert set(OPTIONS) - {"console-origin"} <= set(found)
    assert len(found["aliases"]) == 2
    check_file(parse_config(user_path(), text.encode()))


def test_show_says_where_each_value_comes_from(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_path().write_text('\nctx-size = 5\napi-key = "poppy"\n[models.m]\npin = true\n')
    user_path().chmod(0o600)
    (home / "system.toml").write_text("lan = true\n")
    monkeypatch.setenv("MESH_LLM_PORT", "7")
    monkeypatch.setenv("MESH_LLM_JOIN", "mesh2token")
    shown = json.loads(run("show", "--json", "--set"))
    assert {one["key"]: (one["value"], one["source"], one["place"]) for one in shown["options"]} == {
        "ctx-size": ("5", "user file", f"{user_path()}:2"),
        "api-key": ("(secret, not shown)", "user file", f"{user_path()}:3"),
        "lan": ("true", "system file", f"{home / 'system.toml'}:1"),
        "port": ('"7"', "variable", "MESH_LLM_PORT"),
        "join": ("(secret, not shown)", "variable", "MESH_LLM_JOIN"),
    }
    text = run("show")
    assert "poppy" not in text
    assert "mesh2token" not in text
    assert "pin = true" in text
    assert len(text.splitlines()) > len(OPTIONS)


def test_check_names_variables_that_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_CTX_SIZ", "5")
    assert "MESH_LLM_CTX_SIZ is no variable of mesh-llm. Did you mean MESH_LLM_CTX_SIZE?" in run("check")


def test_check_names_models_that_are_not_here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_MODELS", str(home))
    user_path().write_text('[models.TINY]\npin = true\n[models.tinny]\npin = true\n[aliases]\nx = "tiny"\n')
    text = run("check")
    assert "no errors" in text
    assert "warning: there is no model tinny on this machine. Did you mean tiny?" in text
    assert text.count("warning") == 1


def test_check_reads_a_file_that_is_not_in_use(home: Path) -> None:
    (home / "new.toml").write_text("portt = 1")
    with pytest.raises(MeshError, match=r"new.toml:1: portt is not known"):
        run("check", str(home / "new.toml"))
    with pytest.raises(MeshError, match="There is no file"):
        run("check", str(home / "nothing.toml"))


def test_edit_keeps_what_is_right(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor(home, monkeypatch, 'echo "port = 5" >> "$1"')
    assert "Wrote" in run("edit")
    assert tomllib.loads(user_path().read_text()) == {"port": 5}
    assert user_path().stat().st_mode & 0o777 == 0o600
    editor(home, monkeypatch, ":")
    assert "Nothing changed" in run("edit")
    assert not list(home.glob("mesh-llm-*.toml"))


def test_edit_loses_nothing_and_changes_nothing_when_the_text_is_wrong(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_path().write_text("port = 5\n")
    editor(home, monkeypatch, 'echo "portt = 6" >> "$1"')
    done = CliRunner().invoke(config, ["edit"])
    assert done.exit_code == 1
    assert "config.toml:2: portt is not known" in done.output
    assert user_path().read_text() == "port = 5\n"
    (draft,) = home.glob("mesh-llm-*.toml")
    assert draft.read_text() == "port = 5\nportt = 6\n"
    assert str(draft) in done.output
    assert draft.stat().st_mode & 0o777 == 0o600


def test_edit_warns_of_options_that_contradict_each_other(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor(home, monkeypatch, 'echo \'key-limit = "bob:concurrent=1"\' >> "$1"')
    done = CliRunner().invoke(config, ["edit"])
    assert done.exit_code == 0
    assert "warning: no node starts with this alone: --key-limit names the key 'bob'" in done.output
    assert tomllib.loads(user_path().read_text()) == {"key-limit": "bob:concurrent=1"}


def test_edit_does_not_overwrite_what_another_program_wrote(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user_path().write_text("port = 5\n")
    editor(home, monkeypatch, f'echo "port = 6" > "$1"; echo "port = 7" > {user_path()}')
    done = CliRunner().invoke(config, ["edit"])
    assert (done.exit_code, user_path().read_text()) == (1, "port = 7\n")
    assert "changed by another program" in done.output


@pytest.mark.parametrize(("command", "reason"), [("/nowhere/vi", "cannot be started"), ("false", "status 1")])
def test_an_editor_that_fails_is_named(command: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VISUAL", command)
    with pytest.raises(MeshError, match=reason) as caught:
        run("edit")
    assert "Your text is in" in caught.value.hint


def test_the_schema_knows_every_key(home: Path) -> None:
    schema = config_schema()
    assert set(schema["properties"]) == {*OPTIONS, "models", "aliases"}
    model = schema["$defs"]["ModelSettings"]
    assert set(model["properties"]) == set(FIELDS)
    assert model["additionalProperties"] is False
    assert schema["properties"]["port"] == {
        "description": "Port of the API; 0 for any.", "type": "integer", "minimum": 0, "maximum": 65535,
    }  # fmt: skip
    assert json.loads(run("schema")) == json.loads(json.dumps(schema))
    run("schema", "--output", str(home / "s.json"))
    assert json.loads((home / "s.json").read_text())["title"].startswith("The configuration of mesh-llm")


def test_the_schema_agrees_with_the_program_about_files() -> None:
    good = tomllib.loads(
        'port = 1\nmodel = ["a"]\nlan = true\n[models.m]\nttl = "5m"\npin = true\nengine-args = ["-fa", "on"]\n'
    )
    check = jsonschema_rs.validator_for(config_schema()).is_valid
    assert check(good)
    bad: list[dict[str, object]] = [
        {"portt": 1}, {"port": "x"}, {"lan": 1}, {"models": {"m": {"pin": 1}}}, {"models": {"m": {"x": 1}}},
    ]  # fmt: skip
    assert not any(map(check, bad))
