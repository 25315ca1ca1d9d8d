"""The configuration of a running node: what a reload changes, and how a model's table is written."""

import asyncio
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import LaunchOptions
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.daemon.configuration import ConfigurationControl, compare, edited, with_live_settings
from mesh_llm.daemon.settings import Configuration, Settings
from mesh_llm.runtime.config_file import SYSTEM_VARIABLE, ConfigFile, parse_config, user_path

HOME = Path("home")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path))
    monkeypatch.setenv(SYSTEM_VARIABLE, str(tmp_path / "system.toml"))
    return tmp_path


def read(values: dict[str, str] | None = None, **fields: Any) -> Configuration:
    return Configuration(settings=Settings(home=HOME, **fields), values=values or {})


def test_a_reload_says_what_is_in_effect_and_what_waits_for_the_next_start() -> None:
    before = read({"port": "1", "ctx-size": "2", "name": "'a'"}, model_settings={"m": ModelSettings(pin=True)})
    after = read(
        {"port": "5", "ctx-size": "3", "name": "'a'"},
        model_settings={"n": ModelSettings(ttl=1.0)},
        aliases={"x": "m"},
        api_keys=("other",),
    )
    found = compare(before, after)
    assert found.applied == ("api-key-file", "ctx-size", "models.m", "models.n", "aliases")
    assert found.restart == ("port",)
    assert "In effect now: api-key-file, ctx-size, models.m, models.n, aliases." in found.text
    assert "At the next start of the node: port." in found.text
    assert "Nothing changed" in compare(before, before).text


def test_only_what_can_change_reaches_a_running_node() -> None:
    present = Settings(home=HOME, api_port=1, launch=LaunchOptions(most_slots=2, use_projector=False))
    new = Settings(home=HOME, api_port=2, launch=LaunchOptions(context=9), default_model="m", aliases={"a": "m"})
    live = with_live_settings(present, new)
    assert (live.api_port, live.default_model, live.aliases) == (1, "m", {"a": "m"})
    assert live.launch == LaunchOptions(context=9, most_slots=2, use_projector=False)


class Node:
    """A control, and what it does."""

    def __init__(self, *readings: Configuration | MeshError) -> None:
        self.readings = list(readings)
        self.applied: list[Settings] = []
        self.notices: list[Notice] = []
        self.control = ConfigurationControl(read(), self.load)
        self.control.notify = self.notices.append

    def load(self) -> Configuration:
        reading = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if isinstance(reading, MeshError):
            raise reading
        return reading


BAD = MeshError(code="config_invalid", message="config.toml:3: x is not known.", hint="Did you mean y?")


async def test_a_bad_file_keeps_the_settings_and_says_why() -> None:
    node = Node(BAD)
    node.control.begin(node.applied.append)
    present = node.control.present
    with pytest.raises(MeshError, match="x is not known"):
        await node.control.reload()
    await node.control.reload_by_signal()
    assert (node.control.present, node.applied) == (present, [])
    (notice,) = node.notices
    assert (notice.code, notice.level) == ("config_refused", NoticeLevel.WARNING)
    assert "config.toml:3: x is not known. Did you mean y?" in notice.text


async def test_what_waits_for_the_next_start_is_said_again_until_then() -> None:
    node = Node(read({"port": "2", "ctx-size": "7"}))
    node.control.begin(node.applied.append)
    first, second = await node.control.reload(), await node.control.reload()
    assert (first.applied, first.restart) == (("ctx-size",), ("port",))
    assert (second.applied, second.restart) == ((), ("port",))
    await node.control.reload_by_signal()
    assert node.notices[-1].level is NoticeLevel.WARNING


async def test_settings_that_the_node_refuses_do_not_count() -> None:
    def refuse(_: Settings) -> None:
        raise MeshError(code="model_not_found", message="There is no draft.", hint="")

    node = Node(read({"draft": "'x'"}))
    node.control.begin(refuse)
    with pytest.raises(MeshError, match="no draft"):
        await node.control.reload()
    assert node.control.present == read()


async def test_a_signal_during_the_start_is_kept_until_the_node_runs() -> None:
    node = Node(read())
    with pytest.raises(MeshError, match="starting"):
        await node.control.reload()
    await node.control.reload_by_signal()
    assert node.notices == []
    assert node.control.begin(node.applied.append)
    assert not node.control.begin(node.applied.append)


async def test_a_models_settings_are_written_and_taken_back_if_they_are_refused(home: Path) -> None:
    path = home / "config.toml"
    path.write_text("# mine\nport = 1\n")
    path.chmod(0o600)
    node = Node(read(model_settings={"m": ModelSettings(pin=True)}), BAD)
    node.control.begin(node.applied.append)
    found = await node.control.change_model("m", {"pin": True, "ctx_size": 4096, "temperature": None})
    assert found.applied == ("models.m",)
    text = path.read_text()
    assert text.startswith("# mine\nport = 1\n")
    assert tomllib.loads(text) == {"port": 1, "models": {"m": {"pin": True, "ctx-size": 4096}}}
    assert path.stat().st_mode & 0o777 == 0o600
    for changes, reason in (
        ({"engine-args": ["--port", "1"]}, "opens"),
        ({"ttl": 5}, "x is not"),
        ({"y": 1}, "no setting"),
        ({"chat-template": "@/etc/passwd"}, "only"),
        ({"chat_template": "@/etc/passwd"}, "only"),
        ({"chat-template": "x", "chat_template": "@/etc/passwd"}, "given twice"),
        ({"chat_template": None, "chat-template": "@/etc/passwd"}, "given twice"),
    ):
        with pytest.raises(MeshError, match=reason):
            await node.control.change_model("m", changes)
        assert path.read_text() == text
    assert node.control.model("M").settings == ModelSettings(pin=True)


async def test_a_file_that_was_not_there_is_not_left_behind_by_a_refused_change(home: Path) -> None:
    node = Node(BAD)
    node.control.begin(node.applied.append)
    with pytest.raises(MeshError, match="x is not known"):
        await node.control.change_model("m", {"pin": True})
    assert not (home / "config.toml").exists()


async def test_two_changes_at_once_are_both_kept(home: Path) -> None:
    node = Node(read())
    node.control.begin(node.applied.append)
    await asyncio.gather(*(node.control.change_model(f"m{number}", {"ttl": number}) for number in range(5)))
    assert len(tomllib.loads((home / "config.toml").read_text())["models"]) == 5
    assert (home / "config.toml").stat().st_mode & 0o777 == 0o600


COMMENTED = """# top
model = "a"   # why

[models]  # all
[models."Qwen 3".environment]
OMP_NUM_THREADS = "4" # few
[models.tiny]
ctx_size = 1  # small
# last words

[aliases]
x = "tiny"
"""


@pytest.mark.parametrize("model", ["tiny", "TINY", "Qwen 3", "new.one", 'odd "name"', "ünï", "x"])
def test_comments_and_everything_else_stay(model: str) -> None:
    file = parse_config(user_path(), COMMENTED.encode())
    text = edited(file, model, {"ctx-size": 2, "pin": True})
    for comment in ("# top", "# why", "# all", "# few", "# small", "# last words"):
        assert comment in text
    found = tomllib.loads(text)
    before = tomllib.loads(COMMENTED)
    names = {name.casefold(): name for name in before["models"]}
    own = found["models"][names.get(model.casefold(), model)]
    assert {key.replace("_", "-"): value for key, value in own.items() if key != "environment"} == {
        "ctx-size": 2,
        "pin": True,
    }
    assert {**found, "models": None} == {**before, "models": None}
    assert tomllib.loads(edited(parse_config(user_path(), text.encode()), model, {"ctx-size": None, "pin": None}))


_NAMES = st.text(min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    _NAMES, st.sampled_from(["", COMMENTED, "models.tiny.ttl = 5\n", "models = { tiny = { ttl = 5 } }\n", "port = 1"])
)
def test_any_name_is_written_whole_or_refused(model: str, text: str) -> None:
    file = ConfigFile(user_path(), text, tomllib.loads(text))
    try:
        result = tomllib.loads(edited(file, model, {"ttl": 7}))
    except (MeshError, UnicodeEncodeError):
        return
    folded = {name.casefold(): table for name, table in result["models"].items()}
    assert folded[model.casefold()]["ttl"] == 7
    assert {**result, "models": 0} == {**file.values, "models": 0}
