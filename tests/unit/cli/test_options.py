"""What options mean together, and what is refused."""

import io
import re
from pathlib import Path
from typing import Any

import click
import pytest

from mesh_llm.cli.main import cli
from mesh_llm.cli.options import SECTIONS, serve_options
from mesh_llm.cli.settings import read_api_keys, read_invites, read_origins, to_settings
from mesh_llm.core.types.errors import MeshError


def parse(*args: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    @click.command()
    @serve_options
    def command(**options: Any) -> None:
        seen.update(options)

    command.main(list(args), standalone_mode=False)
    return seen


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path))
    monkeypatch.delenv("MESH_LLM_API_KEY", raising=False)
    monkeypatch.delenv("MESH_LLM_JOIN", raising=False)
    return tmp_path


def test_defaults(home: Path) -> None:
    settings = to_settings(parse())
    assert (settings.api_port, settings.console_port, settings.listen) == (9337, 3131, "127.0.0.1")
    assert settings.home == home
    assert settings.models == ()
    assert settings.launch.use_draft


def test_everything_arrives() -> None:
    settings = to_settings(
        parse(
            "--model", "a", "--model", "b", "--port", "0", "--console", "5", "--headless", "--ctx-size", "4096",
            "--parallel", "2", "--max-vram", "1.5", "--device", "CUDA0", "--bin-dir", "/opt/x", "--draft", "d",
            "--draft-max", "4", "--models-dir", "/m", "--name", "desk", "--journal", "/tmp/j", "--log-level", "debug",
        )
    )  # fmt: skip
    assert settings.models == ("a", "b")
    assert settings.max_memory_bytes == 1_500_000_000
    assert settings.devices == ("CUDA0",)
    assert settings.bin_dir == Path("/opt/x")
    assert settings.launch.context == 4096
    assert settings.launch.slots == 2
    assert settings.launch.draft == "d"
    assert settings.launch.draft_max == 4
    assert not settings.console_page


def test_drafting_and_not_drafting_contradict() -> None:
    with pytest.raises(MeshError, match="contradict"):
        to_settings(parse("--draft", "d", "--no-draft"))


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.4", "myhost"])
def test_other_machines_need_a_key(address: str) -> None:
    with pytest.raises(MeshError) as caught:
        to_settings(parse("--listen", address))
    assert caught.value.code == "api_key_required"
    assert to_settings(parse("--listen", address, "--api-key", "k")).api_keys == ("k",)


@pytest.mark.parametrize("address", ["[::1]", "::1", "127.0.0.1"])
def test_loopback_needs_no_key(address: str) -> None:
    settings = to_settings(parse("--listen", address, "--console-listen", address))
    assert (settings.listen, settings.console_listen) == (address.strip("[]"), address.strip("[]"))


@pytest.mark.parametrize("words", [(), ("--listen", "0.0.0.0", "--api-key", "k")])
def test_two_servers_need_two_ports(words: tuple[str, ...]) -> None:
    with pytest.raises(MeshError, match="--port and --console are both 5000"):
        to_settings(parse("--port", "5000", "--console", "5000", *words))
    assert to_settings(parse("--port", "0", "--console", "0")).api_port == 0


def test_invites_that_no_list_of_processes_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "invites"
    file.write_text("# two meshes\nmesh1a\n mesh1b \n")
    assert read_invites(("mesh1c",), (file,), "mesh1d mesh1a") == ("mesh1c", "mesh1a", "mesh1b", "mesh1d")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"mesh1e\n")))
    assert read_invites(("-",), (), None) == ("mesh1e",)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(MeshError, match="standard input"):
        read_invites(("-",), (), None)
    with pytest.raises(MeshError) as caught:
        to_settings(parse("--join-file", str(tmp_path / "none")))
    assert caught.value.code == "invite_file"
    monkeypatch.setenv("MESH_LLM_JOIN", "mesh1f")
    assert to_settings(parse("--join-file", str(file))).join == ("mesh1a", "mesh1b", "mesh1f")
    with pytest.raises(MeshError, match="--auto finds a mesh"):
        to_settings(parse("--auto"))


def test_the_public_address_of_a_proxy() -> None:
    urls = ("https://Mesh.example", "https://example.org:8443/my/mesh", "https://example.org:8443/my/mesh/")
    assert read_origins(urls) == ("https://mesh.example/", "https://example.org:8443/my/mesh/")
    for bad in ("http://mesh.example", "mesh.example", "https://", "https://a/?b", "https://u@a/", "https://a/#b"):
        with pytest.raises(MeshError, match="--console-origin"):
            read_origins((bad,))


def test_keys_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n one \n\ntwo\n")
    assert read_api_keys((f"@{file}", "three"), "four") == ("one", "two", "three", "four")
    assert read_api_keys((), f"@{file}") == ("one", "two")
    assert to_settings(parse("--api-key-file", str(file), "--api-key", "five")).api_keys == ("five", "one", "two")


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel", "\x1b[31m"])
def test_keys_that_cannot_travel_are_refused(key: str) -> None:
    with pytest.raises(MeshError) as caught:
        read_api_keys((key,), None)
    assert caught.value.code == "api_key_bad"


def test_a_missing_key_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        read_api_keys((f"@{tmp_path / 'none'}",), None)
    assert caught.value.code == "api_key_file"


@pytest.mark.parametrize(
    "args",
    [
        ("--port", "70000"),
        ("--ctx-size", "0"),
        ("--parallel", "0"),
        ("--max-vram", "0"),
        *((option, number) for option in ("--max-vram", "--seed-limit", "--max-rtt") for number in ("nan", "inf")),
        ("--resume-wait", "nan"),
    ],
)
def test_values_out_of_range_are_refused(args: tuple[str, str]) -> None:
    with pytest.raises(click.BadParameter):
        parse(*args)


def test_how_a_model_is_shared() -> None:
    split = to_settings(parse("--split", "--tensor-split", "2,1,0.5", "--max-rtt", "30")).split
    assert (split.asked, split.shares, split.max_rtt_ms) == (True, (2.0, 1.0, 0.5), 30.0)
    split = to_settings(parse()).split
    assert (split.asked, split.shares, split.max_rtt_ms) == (False, (), 80.0)


@pytest.mark.parametrize("shares", ["1", "a,b", "1,-1", "1,0", "nan,1", "1,inf", ",".join(["1"] * 17)])
def test_parts_that_say_nothing(shares: str) -> None:
    with pytest.raises(MeshError, match="--tensor-split"):
        to_settings(parse("--tensor-split", shares))


def test_a_client_shares_nothing() -> None:
    with pytest.raises(MeshError, match="--client"):
        to_settings(parse("--client", "--split"))


@pytest.mark.parametrize(
    ("old", "new", "field", "value"),
    [
        (["--share", "50%"], ["--use", "50%"], "use", 0.5),
        (["--share-limit", "20"], ["--seed-limit", "20"], "seed_limit", 20e6),
        (["--no-share"], ["--no-seed"], "seed", False),
    ],
)
def test_old_names_work_for_one_release(
    old: list[str], new: list[str], field: str, value: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert getattr(to_settings(parse(*new)), field) == value
    assert capsys.readouterr().err == ""
    assert getattr(to_settings(parse(*old)), field) == value
    assert capsys.readouterr().err.startswith(f"warning: {old[0]} is now called {new[0]}.")


def test_a_new_name_wins_over_its_old_one() -> None:
    assert to_settings(parse("--share", "50%", "--use", "25%")).use == 0.25


def test_a_bad_value_of_an_old_name_is_refused() -> None:
    with pytest.raises(click.BadParameter, match="not a finite number") as caught:
        parse("--share-limit", "nan")
    assert caught.value.param is not None
    assert caught.value.param.opts == ["--seed-limit"]


@pytest.mark.parametrize("old", ["--share", "--share-limit", "--no-share"])
def test_old_names_are_neither_in_help_nor_completed(old: str) -> None:
    context = cli.make_context("mesh-llm", [], resilient_parsing=True)
    assert f"{old} " not in cli.get_help(context)
    assert old not in {item.value for item in cli.shell_complete(context, "--s") + cli.shell_complete(context, "--n")}


def test_help_lists_every_option_once_and_by_section() -> None:
    text = cli.get_help(cli.make_context("mesh-llm", [], resilient_parsing=True))
    for option in (option for section in SECTIONS.values() for option in section):
        assert len(re.findall(rf"^  {option.opts[0]}\b(?!-)", text, re.MULTILINE)) == 1, option.opts
    for title in ("Commands", *SECTIONS, "Other"):
        assert f"\n{title}:\n" in text
