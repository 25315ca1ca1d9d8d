"""Meshes that were found on Nostr, for people and for programs. Everything in them was written by strangers."""

import msgspec

from mesh_llm.cli.errors import printable
from mesh_llm.cli.table import table
from mesh_llm.cli.units import size
from mesh_llm.daemon.finding import Candidate, Search

_HEAD = ("MESH", "REGION", "SCORE", "RTT", "NODES", "MEMORY", "CLIENTS", "LOAD", "FOR", "MODELS")


def as_json_text(found: Search) -> str:
    """All that is known, tokens included."""
    return msgspec.json.format(msgspec.json.encode(found)).decode()


def as_table(found: Search, *, explain: bool) -> str:
    """One line a mesh, best first; with `explain` what its score is made of; then how to join the best."""
    lines = table(_HEAD, [_row(candidate) for candidate in found.candidates], "none")
    if explain:
        lines = [
            lines[0],
            *(text for line, one in zip(lines[1:], found.candidates, strict=True) for text in _why(line, one)),
        ]
    lines += ["", "To join the best:", f"  mesh-llm --join {found.candidates[0].token}"]
    if found.failed:
        lines += ["", *(f"No answer from {url}: {reason}" for url, reason in found.failed.items())]
    if found.unreachable:
        lines.append(f"{found.unreachable} more could not be reached.")
    if found.refused:
        lines.append(f"{found.refused} listings were not believed: forged, expired, or damaged.")
    return printable("\n".join(lines))


def _row(candidate: Candidate) -> tuple[str, ...]:
    listing = candidate.listing
    clients = f"{listing.clients}/{listing.max_clients}" if listing.max_clients else str(listing.clients)
    return (
        listing.name or listing.mesh[:10],
        listing.region or "-",
        f"{candidate.score.total:.0f}",
        f"{candidate.rtt_ms:.0f} ms",
        str(listing.nodes),
        size(listing.memory_bytes),
        clients,
        f"{listing.load:.0%}",
        listing.scope,
        ", ".join(model.name for model in listing.serving) or "-",
    )


def _why(line: str, candidate: Candidate) -> list[str]:
    parts = [f"      {part.what:<6} {part.points:5.1f} of {part.most:g}: {part.why}" for part in candidate.score.parts]
    return [line, *parts]
