"""What the options about finding meshes and being found mean together."""

import os
from typing import Any

from mesh_llm.core.errors import MeshError
from mesh_llm.core.publicity import MAX_MESH_NAME, MAX_REGION, Publicity
from mesh_llm.daemon.settings import LISTING_PERIOD, DiscoverySettings
from mesh_llm.discovery.relay_urls import relay_urls

PERIOD_VARIABLE = "MESH_LLM_LISTING_PERIOD"
_LEAST_PERIOD, _MOST_PERIOD = 0.5, 600.0


def read_discovery(options: dict[str, Any]) -> DiscoverySettings:
    """Check the options and put them together. Raises MeshError(options, nostr_relay)."""
    name, region = options["mesh_name"].strip(), options["region"].strip()
    for option, text, most in (("--mesh-name", name, MAX_MESH_NAME), ("--region", region, MAX_REGION)):
        if len(text) > most or not text.isprintable():
            raise _refused(f"{option} takes up to {most} printable characters.", "Shorten it.")
    publish = options["publish"]
    if publish and options["client"]:
        raise _refused("--client has no mesh of its own to --publish.", "Publish on a node that serves.")
    if options["auto"] and options["tokens"]:
        raise _refused("--auto finds a mesh, and --join names one.", "Leave one of them out.")
    only = [
        option
        for option, given in (
            ("--max-clients", options["max_clients"] is not None),
            ("--publish-scope", options["publish_scope"] is not None),
            ("--no-merge", options["no_merge"]),
        )
        if given
    ]
    if only and not publish:
        raise _refused(f"{', '.join(only)} is about --publish, which is not there.", "Add --publish, or leave it out.")
    publicity = Publicity(
        name=name,
        region=region,
        max_clients=options["max_clients"] or 0,
        scope=options["publish_scope"] or "serve",
    )
    return DiscoverySettings(
        auto=options["auto"],
        publicity=publicity if publish else None,
        relays=relay_urls(options["nostr_relays"]),
        region=region,
        merge=not options["no_merge"],
        period=_period(os.environ.get(PERIOD_VARIABLE, "")),
    )


def _period(text: str) -> float:
    """How often an unchanged listing is renewed: for trials, and for private relays."""
    if not text:
        return LISTING_PERIOD
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _LEAST_PERIOD <= seconds <= _MOST_PERIOD:
        raise _refused(
            f"{PERIOD_VARIABLE}={text[:20]} is no time in seconds.", f"From {_LEAST_PERIOD} to {_MOST_PERIOD:.0f}."
        )
    return seconds


def _refused(message: str, hint: str) -> MeshError:
    return MeshError(code="options", message=message, hint=hint)
