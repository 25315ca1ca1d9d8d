"""Public listings on Nostr relays.

This module has the addresses of relays and the text about what becomes public. The command line imports it to check
options, so it imports nothing heavy.
"""

from collections.abc import Iterable
from urllib.parse import urlsplit

from mesh_llm.core.types.announcement import ListingPolicy
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


_MAY = {
    "client": "may ask your models for answers, so it uses your machines' time",
    "serve": (
        "may ask your models, and may answer requests of this mesh itself: a stranger's machine can then be given, and"
        " read, the prompts that are asked here"
    ),
    "split": (
        "may ask, answer, and share models with you: a stranger's machine can read prompts, and attack the memory of"
        " machines that lend theirs"
    ),
}


def consent_text(publicity: ListingPolicy, relays: tuple[str, ...]) -> str:
    """What strangers can read once the mesh is listed, and what they may do. Shown before the first publication."""
    named = f" its name ({publicity.name})," if publicity.name else ""
    placed = f" its region ({publicity.region})," if publicity.region else ""
    return (
        f"This mesh becomes public. Anybody can read on {', '.join(relays)}:{named}{placed} its id; how many nodes and"
        " clients it has, their memory in all, and how busy they are; the names and contexts of the models that they"
        " serve, want, and have on disk; the version; and an invite, which holds this node's id and its network"
        f" addresses. Whoever reads the invite {_MAY[publicity.scope]}"
        f" (--publish-scope {publicity.scope}). Never public: prompts, answers, other nodes' addresses, file paths."
        " The listing is signed by a key made for this (nostr.nsec), renewed every minute, deleted when the node stops,"
        " and expires within two minutes; copies that others keep cannot be taken back. To end it: mesh-llm stop, or"
        " switch it off in the console. To cut off whoever came: mesh-llm invite list, mesh-llm invite revoke ID."
    )
