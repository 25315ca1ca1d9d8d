"""Where the value of each option comes from, and what a file may not hold."""

import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.examples import examples

from mesh_llm.cli.configuration import (
    OPTIONS,
    ConfigurationSource,
    Source,
    check_file,
    choose,
    example,
    from_command_line,
    is_secret,
    shown,
    variable,
)
from mesh_llm.cli.options import serve_options
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.runtime.config_file import SYSTEM_VARIABLE, ConfigFile, parse_config, system_path, user_path


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("MESH_LLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path))
    monkeypatch.setenv(SYSTEM_VARIABLE, str(tmp_path / "system.toml"))
    return tmp_path


def user(text: str) -> ConfigFile:
    return parse_config(user_path(), text.encode())


def system(text: str) -> ConfigFile:
    return parse_config(system_path(), text.encode())


def write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)


def typed(*args: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @serve_options
    @click.pass_context
    def command(context: click.Context, **_: Any) -> None:
        seen.update(from_command_line(context))

    command.main(list(args), standalone_mode=False)
    return seen


EXAMPLES: dict[str, tuple[Any, Any, Any, Any]] = {
    "port": (1, 2, 3, 4),
    "name": ("a", "b", "c", "d"),
    "ctx-size": (100, 200, 300, 400),
    "resume-wait": (1.5, 2.5, 3.5, 4.5),
    "log-level": ("debug", "warning", "error", "debug"),
    "no-fetch": (True, False, True, False),
    "model": (["a"], ["b"], ["c"], ["d"]),
    "gpu-layers": (1, 2, 3, 4),
}
_PRESENT = st.tuples(*[st.booleans()] * 4)


def toml(key: str, value: Any) -> str:
    return f"{key} = {json.dumps(value)}\n"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries(dict.fromkeys(EXAMPLES, _PRESENT)))
def test_the_most_important_source_counts(present: dict[str, tuple[bool, bool, bool, bool]]) -> None:
    given_values: dict[str, Any] = {}
    environment: dict[str, str] = {}
    texts = {"user": "", "system": ""}
    wanted: dict[str, tuple[Source, Any]] = {}
    for key, (by_line, by_variable, by_user, by_system) in present.items():
        values = EXAMPLES[key]
        if by_system:
            texts["system"] += toml(key, values[3])
            wanted[key] = (Source.SYSTEM_FILE, values[3])
        if by_user:
            texts["user"] += toml(key, values[2])
            wanted[key] = (Source.USER_FILE, values[2])
        if by_variable:
            environment[variable(key)] = values[1][0] if isinstance(values[1], list) else str(values[1])
            wanted[key] = (Source.VARIABLE, values[1])
        if by_line:
            given_values[str(OPTIONS[key].name)] = values[0]
            wanted[key] = (Source.COMMAND_LINE, values[0])
    chosen = choose(given_values, environment, [system(texts["system"]), user(texts["user"])])
    for key in EXAMPLES:
        source, value = wanted.get(key, (Source.DEFAULT, None))
        assert chosen[key].source is source
        if source is not Source.DEFAULT:
            assert chosen[key].value == (
                tuple(value) if isinstance(value, list) and source is not Source.COMMAND_LINE else value
            )


def test_every_option_of_serving_has_a_key_a_variable_and_a_default() -> None:
    chosen = choose({}, {}, [])
    assert set(chosen) == set(OPTIONS)
    options = {str(OPTIONS[key].name): one.value for key, one in chosen.items()}
    seen: dict[str, Any] = {}

    @click.command()
    @serve_options
    def command(**values: Any) -> None:
        seen.update(values)

    command.main([], standalone_mode=False)
    assert options == seen


@pytest.mark.parametrize("key", list(OPTIONS))
def test_the_example_of_every_option_is_right_in_a_file(key: str) -> None:
    line = example(key)
    if key == "console-origin":
        line = 'console-origin = ["https://mesh.example"]'
    check_file(user(line))
    assert choose({}, {}, [user(line)])[key].source is Source.USER_FILE


def test_a_typed_option_counts_also_by_its_old_name() -> None:
    assert typed() == {}
    assert typed("--ctx-size", "5", "--no-fetch") == {"ctx_size": 5, "no_fetch": True}
    assert typed("--port", "9337") == {"api_port": 9337}
    assert typed("--relay", "wss://r.example") == {"nostr_relays": ("wss://r.example",)}
    assert typed("--share-limit", "3") == {"seed_limit": 3.0}


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("portt = 1", r"config.toml:1: portt is not known", "Did you mean port?"),
        ("\nctxsize = 1", r"config.toml:2: ctxsize is not known", "Did you mean ctx-size?"),
        ("[model.x]\npin = true", r":1: \[model\] is no table", "Did you mean models?"),
        ("[models.x]\n\ntemprature = 1", r":3: temprature is no setting", "Did you mean temperature?"),
        ("[models.x]\ntemperature = 99", r":2: temperature: expected `float` <= 5.0", "config schema"),
        ("[models.x]\npin = 1", r":2: pin: expected `bool`", "config schema"),
        ('[models.x]\nttl = "soon"', r":2: ttl is a time", "30m"),
        ('[models.x]\nengine_args = ["--host", "::"]', r":2: engine-args: --host is refused", "Leave it out"),
        ('[models.x.environment]\nLD_PRELOAD = "x"', r":1: An engine may not", "Possible are"),
        ('[models.x]\nchat-template = "@/nowhere/x"', r":2: cannot read /nowhere/x", "path"),
        ("models = 1", r":1: models holds tables", "[models"),
        ("[models]\nx = 1", r":2: x is not a table", "[models"),
        ('[aliases]\nx = "y*"', r":2: y\* is a pattern", "alias"),
        ("[aliases]\nx = 1", r":2: an alias and its model are texts", "alias"),
        ("aliases = []", r":1: aliases is a table", "[aliases]"),
        ("no-fetch = 1", r":1: no-fetch takes true or false", "no-fetch = true"),
        ("port = true", r":1: port takes a text or a number", "port = 9337"),
        ("port = 99999", r":1: port: 99999 is not in the range", "--port"),
        ("ctx-size = 1.5", r":1: ctx-size: '1.5' is not a valid integer", "--ctx-size"),
        ("max-vram = nan", r":1: max-vram: ", "--max-vram"),
        ('log-level = "loud"', r":1: log-level: 'loud' is not one of", "--log-level"),
        ("model = [1, [2]]", r":1: model takes a list", "model ="),
        ("port = 2020-01-01", r":1: port takes", "port ="),
        ("ctx-size = 1\nctx_size = 2", r"ctx-size is there twice", "Leave one"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_line(text: str, message: str, hint: str) -> None:
    with pytest.raises(MeshError, match=message) as caught:
        check_file(user(text))
    assert hint in caught.value.hint


_KEYS = [*OPTIONS, "models.x", "models", "aliases", "aliases.y", "models.x.ttl", "models.x.engine-args"]
_VALUES = [
    "1",
    "-1",
    "true",
    '"x"',
    "[]",
    "[1]",
    "{}",
    "1e400",
    "nan",
    "1979-05-27",
    '{ a = "b" }',
    '"auto"',
    '["-fa"]',
]
_LINES = st.tuples(
    st.sampled_from(_KEYS) | st.text("abc-_.", min_size=1), st.sampled_from(_VALUES) | st.integers().map(str)
).map(" = ".join)


@examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.lists(_LINES, max_size=4).map(lambda lines: "\n".join(lines).encode())))
def test_any_bytes_give_settings_or_an_error_that_says_where(data: bytes) -> None:
    user_path().write_bytes(data)
    user_path().chmod(0o600)
    try:
        ConfigurationSource({}, {}).load()
    except MeshError as error:
        refused = error
    else:
        return
    assert refused.message
    assert refused.hint


def test_a_wrong_variable_is_named() -> None:
    with pytest.raises(MeshError, match=r"MESH_LLM_CTX_SIZE=x: 'x' is not a valid integer") as caught:
        choose({}, {"MESH_LLM_CTX_SIZE": "x"}, [])
    assert "unset MESH_LLM_CTX_SIZE" in caught.value.hint
    # Kubernetes sets this one for a service that is called mesh-llm.
    assert choose({}, {"MESH_LLM_PORT": "tcp://10.0.0.1:9337"}, [])["port"].source is Source.DEFAULT
    assert choose({}, {"MESH_LLM_MODEL": "a b", "MESH_LLM_LAN": "yes"}, [])["model"].value == ("a", "b")


@pytest.mark.parametrize(
    ("text", "given_values", "gone"),
    [
        ('draft = "d"', {"no_draft": True}, "draft"),
        ("no-draft = true", {"draft": "d"}, "no-draft"),
        ("auto = true", {"tokens": ("t",)}, "auto"),
        ('model = "m"', {"client": True}, "model"),
        ("publish = true", {"client": True}, "publish"),
    ],
)
def test_what_was_typed_comes_before_what_contradicts_it(text: str, given_values: dict[str, Any], gone: str) -> None:
    assert choose({}, {}, [user(text)])[gone].source is Source.USER_FILE
    assert choose(given_values, {}, [user(text)])[gone].source is Source.DEFAULT


def test_files_are_merged_key_by_key() -> None:
    write(system_path(), '[models.m]\npin = true\nttl = 5\nctx-size = 9\n[aliases]\na = "m"\nb = "m"\n')
    write(user_path(), 'port = 0\n[models.m]\npin = false\nttl = "1m"\naliases = ["c"]\n[aliases]\na = "other"\n')
    read = ConfigurationSource({}, {}).load()
    assert read.settings.model_settings == {"m": ModelSettings(ttl=60.0, ctx_size=9, aliases=("c",))}
    assert read.settings.aliases == {"a": "other", "b": "m", "c": "m"}
    assert (read.settings.api_port, read.files) == (0, (system_path(), user_path()))


def test_a_template_is_read_from_its_file(home: Path) -> None:
    (home / "t.jinja").write_text("{{ x }}")
    write(user_path(), f'[models.m]\nchat-template = "@{home}/t.jinja"\n')
    assert ConfigurationSource({}, {}).load().settings.model_settings["m"].chat_template == "{{ x }}"


def test_options_that_contradict_each_other_in_a_file_are_refused() -> None:
    write(user_path(), 'draft = "x"\nno-draft = true\n')
    with pytest.raises(MeshError, match="contradict"):
        ConfigurationSource({}, {}).load()


def test_an_invite_that_is_gone_after_the_start_does_not_matter(home: Path) -> None:
    (home / "invite").write_text("mesh2token\n")
    write(user_path(), f'join-file = "{home}/invite"\n')
    source = ConfigurationSource({}, {})
    assert source.load().settings.join == ("mesh2token",)
    (home / "invite").unlink()
    assert source.load().settings.join == ()
    with pytest.raises(MeshError, match="Cannot read invites"):
        ConfigurationSource({}, {}).load()


def test_keys_of_variables_add_to_those_of_files() -> None:
    write(user_path(), 'api-key = "one"\n')
    read = ConfigurationSource({}, {"MESH_LLM_API_KEY": "two"}).load()
    assert read.settings.api_keys == ("one", "two")


def test_secrets_are_not_shown() -> None:
    assert [key for key in OPTIONS if is_secret(key)] == ["join", "api-key"]
    assert shown("api-key", ["k"]) == "(secret, not shown)"
    assert shown("api-key", None) == "-"
    assert (shown("port", 5), shown("no-fetch", True), shown("model", ["a"])) == ("5", "true", '["a"]')


def test_a_file_with_a_secret_that_others_read_is_refused() -> None:
    write(user_path(), 'api-key = "k"\n')
    user_path().chmod(0o644)
    with pytest.raises(MeshError, match="api-key is a secret") as caught:
        ConfigurationSource({}, {}).load()
    assert caught.value.code == "config_exposed"
