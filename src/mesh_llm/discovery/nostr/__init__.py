"""Public listings on Nostr relays.

This module has the addresses of relays. The command line imports it to check options, so it imports nothing heavy.
"""

from collections.abc import Iterable
from urllib.parse import urlsplit

from mesh_llm.core.types.errors import MeshError

DEFAULT_RELAYS = ("wss://relay.damus.io", "wss://nos.lol", "wss://relay.primal.net")
"""Three public, free relays of different operators."""
MOST_RELAYS = 16
_MAX_URL = 256


def parse_relay_urls(texts: Iterable[str]) -> tuple[str, ...]:
    """The relays to use: those that the user names, without duplicates, or the default ones.

    Raises:
        MeshError: `nostr_relay`, one is not a relay's address, or there are too many.
    """
    urls = tuple(dict.fromkeys(text.strip().rstrip("/") for text in texts))
    for url in urls:
        try:
            parts = urlsplit(url)
            good = parts.scheme in {"ws", "wss"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            good = False
        if not good or len(url) > _MAX_URL or not url.isprintable() or " " in url:
            raise MeshError(
                code="nostr_relay",
                message=f"{url[:80]!r} is not the address of a Nostr relay.",
                hint="It looks like wss://relay.example.org, or ws://127.0.0.1:7777 for one of your own.",
                status=400,
            )
    if len(urls) > MOST_RELAYS:
        raise MeshError(
            code="nostr_relay",
            message=f"{len(urls)} relays are too many.",
            hint=f"Name at most {MOST_RELAYS}.",
            status=400,
        )
    return urls or DEFAULT_RELAYS
