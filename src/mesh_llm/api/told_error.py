"""What an engine or another node says where it refuses a request: the sentence in the body of its answer."""

from typing import Any

import msgspec

_MOST = 300


class _Refusal(msgspec.Struct):
    error: dict[str, Any] | str | None = None
    message: str | None = None


def told_error(body: bytes | None, status: int) -> str:
    """The reason in one line, at most 300 characters; `body`: of an answer with this status, if it is known."""
    said = _sentence(body) if body else ""
    line = " ".join(said.split())
    return line[:_MOST] or f"status {status}"


def _sentence(body: bytes) -> str:
    try:
        told = msgspec.json.decode(body, type=_Refusal)
    except msgspec.MsgspecError:
        return ""
    found = told.error.get("message") if isinstance(told.error, dict) else told.error
    return found if found and isinstance(found, str) else told.message or ""
