"""The one family of errors that a user can meet, and sizes, times and names as people write them."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""All that msgspec raises for bytes that it cannot read: text that is no UTF-8, and values that are nested too deeply,
have errors of their own. A file may be damaged, and a peer may send anything."""


@dataclass(eq=False)
class MeshError(Exception):
    """An expected failure that a user meets.

    Attributes:
        code: stable machine-readable name, such as `model_not_found`.
        message: what happened, one or two sentences.
        hint: what to do next; empty where nothing can be done.
        status: the HTTP status to answer with.
        retry_after: seconds after which to try again; None where that does not help.
        param: the request field at fault, as in OpenAI's error shape.
    """

    code: str
    message: str
    hint: str = ""
    status: int = 500
    retry_after: float | None = None
    param: str | None = None

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


def size(count: float) -> str:
    """Bytes as people write them, in powers of 1000: 5.6 MB, 24.0 GB; a dash for none."""
    if count <= 0:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in {"B", "kB"} else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def listed(names: Sequence[str], most: int | None = None) -> str:
    """Names in a sentence: "A, B and C". Of more than `most` the first of them: "A, B and 3 more"."""
    if most is not None and len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"


def duration(seconds: float) -> str:
    """A time span in its two largest units: 3m 12s, 2d 4h."""
    left = int(seconds)
    parts: list[str] = []
    for name, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, length)
        if amount or (name == "s" and not parts):
            parts.append(f"{amount}{name}")
    return " ".join(parts[:2])
