"""What a starting daemon tells whoever watches it: values, so that a terminal and a log can show them differently."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from mesh_llm.core.effects import NoticeLevel
from mesh_llm.core.status import Status


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A step of the start. `name`: engine, devices, models, fetch, mesh, api, model, split; `done`: it ended well."""

    name: str
    text: str
    done: bool


@dataclass(frozen=True, kw_only=True)
class Told:
    """A notice, as it was given."""

    level: NoticeLevel
    code: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The API answers with a model, and a node that joins others has heard of them, unless nobody answers for long.

    Told once; `status` holds addresses, models and the invite. `sign_in_url`: opens the page signed in, once; empty
    where there is no page.
    """

    status: Status
    console_url: str
    sign_in_url: str = ""


Progress: TypeAlias = Stage | Told | Ready
OnProgress: TypeAlias = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Nobody watches."""
