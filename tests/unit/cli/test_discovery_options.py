from typing import Any

import pytest
from tests.unit.cli.test_options import parse

from mesh_llm.cli.settings import PERIOD_VARIABLE, to_settings
from mesh_llm.core.types.announcement import Publicity
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.settings import DiscoverySettings
from mesh_llm.discovery.nostr.relay_urls import DEFAULT_RELAYS, MOST_RELAYS, relay_urls


def discovery(*words: str) -> DiscoverySettings:
    settings: Any = to_settings(parse(*words))
    return settings.discovery


def test_nothing_is_published_unless_asked_for() -> None:
    settings = discovery("--mesh-name", "Lab", "--region", "AU")
    assert settings.publicity is None
    assert not settings.auto
    assert settings.urls == DEFAULT_RELAYS


def test_everything_arrives() -> None:
    settings = discovery(
        "--publish", "--mesh-name", "Sydney Lab", "--region", "AU", "--max-clients", "5", "--publish-scope", "client",
        "--nostr-relay", "ws://127.0.0.1:7777/", "--nostr-relay", "wss://relay.example.org", "--no-merge", "--auto",
    )  # fmt: skip
    assert settings.publicity == Publicity(name="Sydney Lab", region="AU", max_clients=5, scope="client")
    assert settings.urls == ("ws://127.0.0.1:7777", "wss://relay.example.org")
    assert (settings.auto, settings.merge, settings.life) == (True, False, 120.0)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--publish", "--client", "--join", "mesh1x"), "no mesh of its own"),
        (("--auto", "--join", "mesh1x"), "Leave|names one"),
        (("--max-clients", "5"), "means nothing without --publish"),
        (("--publish-scope", "client", "--no-merge"), "--publish-scope, --no-merge means nothing"),
        (("--publish", "--mesh-name", "x" * 65), "--mesh-name takes up to 64"),
        (("--region", "a\x1b[2J"), "--region takes up to 32 printable"),
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
    assert relay_urls(["ws://a", "ws://a/", " ws://a "]) == ("ws://a",)
    with pytest.raises(MeshError, match="too many"):
        relay_urls([f"ws://a{number}" for number in range(MOST_RELAYS + 1)])
    for wrong in ("ws://", "ws://a:0", "ws://[::1", "ws://a b", "ws://" + "a" * 300):
        with pytest.raises(MeshError, match="is not the address"):
            relay_urls([wrong])
