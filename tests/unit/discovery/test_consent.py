"""What a home remembers of its user's consent to a public listing."""

from pathlib import Path

import pytest

from mesh_llm.core.types.announcement import ListingPolicy
from mesh_llm.discovery.nostr.consent import PublicationConsent, scope_sentence
from mesh_llm.runtime.home import Home

RELAYS = ("ws://a", "ws://b")
CLIENT, SERVE, SPLIT = (ListingPolicy(scope=scope) for scope in ("client", "serve", "split"))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


def test_it_is_asked_once_and_again_for_a_wider_scope_or_another_relay(home: Home) -> None:
    assert not PublicationConsent(home).covers(CLIENT, RELAYS)
    PublicationConsent(home).give(SERVE, RELAYS)
    assert home.publication.stat().st_mode & 0o777 == 0o600
    consent = PublicationConsent(home)
    assert consent.covers(SERVE, RELAYS)
    assert consent.covers(CLIENT, RELAYS[:1])
    assert not consent.covers(SPLIT, RELAYS)
    assert not consent.covers(SERVE, ("ws://c",))
    consent.give(CLIENT, ("ws://c",))
    assert consent.covers(SERVE, (*RELAYS, "ws://c"))
    consent.give(SPLIT, RELAYS)
    assert consent.covers(SPLIT, RELAYS)


def test_a_home_that_has_published_before_there_was_a_question_is_not_asked(home: Home) -> None:
    home.nostr_key.write_text("nsec")
    assert PublicationConsent(home).covers(SERVE, RELAYS)
    assert not PublicationConsent(home).covers(SPLIT, RELAYS)


def test_a_key_that_was_made_without_publishing_is_no_consent(home: Home) -> None:
    PublicationConsent(home).withhold()
    home.nostr_key.write_text("nsec")
    assert not PublicationConsent(home).covers(CLIENT, RELAYS)
    PublicationConsent(home).give(SERVE, RELAYS)
    PublicationConsent(home).withhold()
    assert PublicationConsent(home).covers(SERVE, RELAYS)


def test_a_damaged_file_means_that_it_is_asked_again(home: Home) -> None:
    home.nostr_key.write_text("nsec")
    home.publication.write_bytes(b'{"scope": "all"}')
    assert not PublicationConsent(home).covers(CLIENT, RELAYS)
    PublicationConsent(home).give(CLIENT, RELAYS)
    assert PublicationConsent(home).covers(CLIENT, RELAYS)


def test_the_scope_is_said_and_what_serve_would_allow(home: Home) -> None:
    fresh = scope_sentence(CLIENT, None)
    assert "may only send requests (--publish-scope client). With --publish-scope serve" in fresh
    assert "read" in fresh
    assert "Earlier versions" not in fresh
    consent = PublicationConsent(home)
    assert consent.widest(RELAYS) is None
    consent.give(SERVE, RELAYS)
    assert consent.covers(CLIENT, RELAYS)
    assert scope_sentence(CLIENT, consent.widest(RELAYS)).endswith("to keep that, add --publish-scope serve.")
    assert "can be given, and read, prompts" in scope_sentence(SERVE, "serve")
    assert "attack" in scope_sentence(SPLIT, "serve")
