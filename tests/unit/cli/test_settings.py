"""What the options of serving mean together, and what is refused."""

import io
from pathlib import Path
from typing import Any

import click
import pytest

from mesh_llm.api.types import KeyLimit
from mesh_llm.cli.options import serve_options
from mesh_llm.cli.settings import (
    PERIOD_VARIABLE,
    exposed_secrets,
    most_slots,
    read_api_keys,
    read_invites,
    read_origins,
    read_part,
    read_yield,
    to_settings,
)
from mesh_llm.core.config import YieldPolicy
from mesh_llm.core.trust.strangers import NO_LIMITS, StrangerLimits
from mesh_llm.core.types.announcement import ListingPolicy
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model_settings import ModelSettings, guesses_alone
from mesh_llm.daemon.settings import DiscoverySettings
from mesh_llm.discovery.nostr import DEFAULT_RELAYS, MOST_RELAYS, parse_relay_urls


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


def test_the_port_for_clients_of_ollama() -> None:
    assert to_settings(parse()).ollama_port is None
    assert to_settings(parse("--client", "--ollama-port", "11434")).ollama_port == 11434
    assert to_settings(parse("--ollama-port", "0", "--port", "0")).ollama_port == 0
    for taken in (("--port", "11434"), ("--console", "11434")):
        with pytest.raises(MeshError, match=f"--ollama-port and {taken[0]} are both 11434"):
            to_settings(parse("--ollama-port", "11434", *taken))


def test_a_client_may_have_a_default_model() -> None:
    assert to_settings(parse("--client", "--default-model", "tiny")).default_model == "tiny"
    assert to_settings(parse()).default_model == ""


@pytest.mark.parametrize(
    ("words", "port"),
    [
        (("--console",), 3131),
        (("--console", "--headless"), 3131),
        (("--console", "5000"), 5000),
        (("--console=5000", "--headless"), 5000),
    ],
)
def test_the_consoles_port_may_be_left_out(words: tuple[str, ...], port: int) -> None:
    assert to_settings(parse(*words)).console_port == port


@pytest.mark.parametrize("option", ["--quic-port", "--bind-port"])
def test_the_meshs_port_has_two_names(option: str) -> None:
    assert to_settings(parse(option, "4444")).quic_port == 4444


@pytest.mark.parametrize(
    ("words", "speculation", "use_draft"),
    [
        ((), "", True),
        (("--spec", "auto", "--no-draft"), "", False),
        (("--spec", "draft"), "draft", True),
        (("--spec", "eagle3", "--draft", "d"), "eagle3", True),
        (("--spec", "ngram"), "ngram", False),
        (("--spec", "mtp", "--no-draft"), "mtp", False),
        (("--spec", "off"), "off", False),
    ],
)
def test_kinds_of_speculation(words: tuple[str, ...], speculation: str, use_draft: bool) -> None:
    launch = to_settings(parse(*words)).launch
    assert (launch.engine.speculation, launch.use_draft) == (speculation, use_draft)


@pytest.mark.parametrize(
    "words",
    [
        ("--spec", "ngram", "--draft", "d"),
        ("--spec", "off", "--draft", "d"),
        ("--spec", "draft", "--no-draft"),
        ("--spec", "eagle3"),
    ],
)
def test_contradicting_kinds_of_speculation(words: tuple[str, ...]) -> None:
    with pytest.raises(MeshError, match="--spec"):
        to_settings(parse(*words))


def test_a_models_speculation_comes_before_the_nodes() -> None:
    launch = to_settings(parse("--spec", "ngram")).launch
    assert launch.adapted(ModelSettings(top_k=3)).engine.speculation == "ngram"
    for settings, expected in (
        (ModelSettings(speculation="off"), ("off", False)),
        (ModelSettings(speculation="auto"), ("", True)),
        (ModelSettings(draft="d"), ("", True)),
    ):
        own = launch.adapted(settings)
        assert (own.engine.speculation, own.use_draft) == expected


def test_what_guesses_without_a_draft() -> None:
    """Its speed says nothing of the machine's."""
    kinds = ("", "draft", "eagle3", "off", "mtp", "ngram", "ngram-mod", "ngram-cache")
    assert [guesses_alone(kind) for kind in kinds] == [False] * 4 + [True] * 4


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


def test_names_and_pages_that_are_allowed() -> None:
    found = to_settings(
        parse(
            *("--allow-host", "Host.docker.internal", "--allow-host", "mybox.local:8080"),
            *("--allow-origin", "https://Chat.example:443/", "--allow-origin", "app://obsidian.md"),
        )
    )
    assert found.allow_hosts == ("host.docker.internal", "mybox.local:8080")
    assert found.allow_origins == ("https://chat.example", "app://obsidian.md")
    for bad in ("*", "http://mybox.local", "mybox.local/", "*.local", ""):
        with pytest.raises(MeshError, match="--allow-host"):
            to_settings(parse("--allow-host", bad))
    for bad in (
        "*",
        "null",
        "chat.example",
        "https://chat.example/page",
        "https://",
        "chrome-extension://*",
        "file://",
    ):
        with pytest.raises(MeshError, match="--allow-origin"):
            to_settings(parse("--allow-origin", bad))


def test_limits_of_keys() -> None:
    keys = ("--api-key", "laptop:secret", "--api-key", "plain")
    given = ("--key-limit", "laptop:tokens_per_day=1000,concurrent=4", "--key-limit", "unnamed:concurrent=1")
    found = to_settings(parse(*keys, *given))
    assert found.key_limits == {
        "laptop": KeyLimit(tokens_per_day=1000, concurrent=4),
        "unnamed": KeyLimit(concurrent=1),
    }
    for bad in (
        "laptop",
        "laptop:",
        "laptop:tokens=3",
        "laptop:concurrent=0",
        "laptop:concurrent=1;x",
        "a:concurrent=1",
    ):
        with pytest.raises(MeshError, match="--key-limit"):
            to_settings(parse(*keys, "--key-limit", bad))


def test_keys_from_file_and_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n one \n\ntwo\n")
    assert read_api_keys((f"@{file}", "three"), "four") == ("one", "two", "three", "four")
    assert read_api_keys((), f"@{file}") == ("one", "two")
    assert to_settings(parse("--api-key-file", str(file), "--api-key", "five")).api_keys == ("five", "one", "two")


def test_files_with_secrets_that_others_can_read(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("own", "group", "all", "named", "invite")]
    for file, mode in zip(files, (0o600, 0o640, 0o604, 0o644, 0o644), strict=True):
        file.write_text("key\n")
        file.chmod(mode)
    own, group, everybody, named, invite = map(str, files)
    options = parse("--api-key-file", own, "--api-key-file", group, "--api-key", f"@{everybody}", "--join-file", invite)
    exposed = exposed_secrets(options, {"MESH_LLM_API_KEY": f"@{named}"})
    assert exposed == tuple(map(Path, (group, invite, everybody, named)))
    assert exposed_secrets(parse("--api-key-file", str(tmp_path / "none"), "--api-key", "k"), {}) == ()


@pytest.mark.parametrize("key", ["a b", "a\nb", "schlüssel", "\x1b[31m"])
def test_keys_that_cannot_travel_are_refused(key: str) -> None:
    with pytest.raises(MeshError) as caught:
        read_api_keys((key,), None)
    assert caught.value.code == "api_key_bad"


def test_a_missing_key_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        read_api_keys((f"@{tmp_path / 'none'}",), None)
    assert caught.value.code == "api_key_file"


def test_how_a_model_is_shared() -> None:
    split = to_settings(parse("--split", "--tensor-split", "2,1,0.5", "--max-rtt", "30")).split
    assert (split.asked, split.shares, split.max_rtt_ms) == (True, (2.0, 1.0, 0.5), 30.0)
    split = to_settings(parse()).split
    assert (split.asked, split.shares, split.max_rtt_ms, split.wire) == (False, (), 80.0, "auto")
    assert to_settings(parse("--wire", "q8")).split.wire == "q8"


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


def discovery(*words: str) -> DiscoverySettings:
    settings: Any = to_settings(parse(*words))
    return settings.discovery


def test_nothing_is_published_unless_asked_for() -> None:
    settings = discovery("--mesh-name", "Lab", "--region", "AU")
    assert settings.publicity is None
    assert not settings.auto
    assert settings.urls == DEFAULT_RELAYS


def test_strangers_may_only_ask_unless_said_otherwise() -> None:
    for words, scope in (((), "client"), (("--publish-scope", "serve"), "serve")):
        policy = discovery("--publish", *words).publicity
        assert policy is not None
        assert policy.scope == scope


def test_quotas_of_strangers() -> None:
    assert to_settings(parse()).stranger_limits == StrangerLimits()
    assert to_settings(parse("--stranger-limit", "off")).stranger_limits == NO_LIMITS
    read = to_settings(parse("--stranger-limit", "concurrent=1, all_tokens_per_day=off")).stranger_limits
    assert read == StrangerLimits(concurrent=1, all_tokens_per_day=0)
    for wrong in ("", "5", "concurrent=0", "concurrent=1,", "concurrent=1,concurrent=2", "tokens=5", "concurrent=-1"):
        with pytest.raises(MeshError, match="--stranger-limit"):
            to_settings(parse("--stranger-limit", wrong))


def test_what_is_published_arrives() -> None:
    settings = discovery(
        "--publish", "--mesh-name", "Sydney Lab", "--region", "AU", "--max-clients", "5", "--publish-scope", "client",
        "--nostr-relay", "ws://127.0.0.1:7777/", "--nostr-relay", "wss://relay.example.org",
        "--merge", "--merge", "AB" * 8, "--auto",
    )  # fmt: skip
    assert settings.publicity == ListingPolicy(name="Sydney Lab", region="AU", max_clients=5, scope="client")
    assert settings.urls == ("ws://127.0.0.1:7777", "wss://relay.example.org")
    assert (settings.auto, settings.life) == (True, 120.0)
    assert (settings.merge_keys, settings.merge_held) == (("ab" * 8,), True)


def test_nobody_merges_unless_asked_to() -> None:
    for words in (("--publish",), ("--publish", "--no-merge")):
        settings = discovery(*words)
        assert (settings.merge_keys, settings.merge_held) == ((), False)
    assert not discovery("--publish", "--merge", "ab" * 32).merge_held


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--publish", "--client", "--join", "mesh1x"), "no mesh of its own"),
        (("--auto", "--join", "mesh1x"), "Leave|names one"),
        (("--max-clients", "5"), "means nothing without --publish"),
        (("--publish-scope", "client", "--merge"), "--publish-scope, --merge means nothing"),
        (("--publish", "--merge", "Sydney Lab"), "is not the key of a mesh"),
        (("--publish", "--merge", "ab" * 7), "is not the key of a mesh"),
        (("--publish", "--mesh-name", "x" * 65), "--mesh-name takes up to 64"),
        (("--region", "a\x1b[2J"), "--region takes up to 32 printable"),
        (("--name", "x" * 65), "--name takes up to 64 printable"),
        (("--nostr-relay", "https://relay.example.org"), "is not the address"),
        (("--nostr-relay", "relay.example.org"), "is not the address"),
    ],
)
def test_what_makes_no_sense_is_refused(words: tuple[str, ...], reason: str) -> None:
    with pytest.raises(MeshError, match=reason):
        discovery(*words)


def test_the_period_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PERIOD_VARIABLE, "4")
    assert (discovery().period, discovery().life) == (4.0, 8.0)
    for wrong in ("0", "soon", "1e9", "nan"):
        monkeypatch.setenv(PERIOD_VARIABLE, wrong)
        with pytest.raises(MeshError, match="is not a number of seconds"):
            discovery()


def test_relays_are_named_once_and_not_too_many() -> None:
    assert parse_relay_urls(["ws://a", "ws://a/", " ws://a "]) == ("ws://a",)
    with pytest.raises(MeshError, match="too many"):
        parse_relay_urls([f"ws://a{number}" for number in range(MOST_RELAYS + 1)])
    for wrong in ("ws://", "ws://a:0", "ws://[::1", "ws://a b", "ws://" + "a" * 300):
        with pytest.raises(MeshError, match="is not the address"):
            parse_relay_urls([wrong])


@pytest.mark.parametrize(
    ("words", "policy"),
    [
        ([], YieldPolicy()),
        (["load"], YieldPolicy(load=0.5)),
        (["load:70%"], YieldPolicy(load=0.7)),
        (["load:0.7,battery"], YieldPolicy(load=0.7, battery=True)),
        (["auto"], YieldPolicy(load=0.5, battery=True, fullscreen=True)),
        (["load:20%", "auto"], YieldPolicy(load=0.2, battery=True, fullscreen=True)),
        (["09:00-17:30", "22:00-8:00"], YieldPolicy(schedule=((540, 1050), (1320, 480)))),
        (["18:00-24:00,fullscreen"], YieldPolicy(fullscreen=True, schedule=((1080, 1440),))),
    ],
)
def test_when_to_yield(words: list[str], policy: YieldPolicy) -> None:
    assert read_yield(words) == policy


@pytest.mark.parametrize(
    "word",
    ["", "sometimes", "loads", "load:0", "load:150%", "9-17", "25:00-26:00", "09:61-10:00", "09:00-09:00"],
)
def test_what_is_not_understood_says_what_would_be(word: str) -> None:
    with pytest.raises(MeshError) as refused:
        read_yield([word])
    assert refused.value.hint


def test_parts() -> None:
    assert read_part("50%", "--use") == 0.5
    assert read_part("0.25", "--use") == 0.25
    assert read_part("100%", "--use") == 1.0
    for bad in ("0", "0%", "101%", "-1", "half", "nan", "inf"):
        with pytest.raises(MeshError):
            read_part(bad, "--use")


def test_slots_follow_the_share() -> None:
    assert [most_slots(share) for share in (1.0, 0.8, 0.5, 0.3, 0.25, 0.1)] == [4, 4, 2, 2, 1, 1]
