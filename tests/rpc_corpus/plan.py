"""Which recordings are made of which architecture."""

from dataclasses import dataclass

from tests.rpc_corpus import architectures
from tests.rpc_corpus.driver import Case

IMPOSSIBLE: dict[str, str] = {}
"""Architectures that the engine names but that no model can be made of, with the reason."""


@dataclass(frozen=True)
class Planned:
    """A case, the name of its recordings, and over how many workers the model is split."""

    name: str
    case: Case
    workers: int = 1


def cases(architecture: str) -> list[Planned]:
    """All cases of an architecture."""
    found: list[Planned] = []

    def add(name: str, workers: int = 1, **fields: object) -> None:
        case = Case(architecture=architecture, plugin="", endpoints=(), **fields)  # pyright: ignore[reportArgumentType]
        found.append(Planned(name, case, workers))

    add("most", contexts=("plain", "flash", "flash-q8_0"))
    if architecture in architectures.DENSE_AND_EXPERTS:
        add("dense", experts=False, contexts=("plain",))
    add("most-split", workers=2, contexts=("flash",), output_on_host=True)
    return found
