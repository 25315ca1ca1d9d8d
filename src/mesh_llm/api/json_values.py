"""Reading decoded JSON whose shape is not known: each function gives something of its type, whatever it gets."""

from typing import Any, TypeAlias, cast

Json: TypeAlias = dict[str, Any]

_MAX_TOKENS = 2**53


def mapping(value: object) -> Json:
    """The value, if it is a JSON object; else an empty one."""
    return cast("Json", value) if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """The value, if it is a JSON array; else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def last(values: list[Any]) -> Json:
    """The last of the values, if it is a JSON object; else an empty one."""
    return mapping(values[-1]) if values else {}


def text(value: object) -> str:
    """The value, if it is a string; else an empty one."""
    return value if isinstance(value, str) else ""


def count(value: object) -> int | None:
    """The value as a number of tokens; None where it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _MAX_TOKENS:
        return None
    return int(value)
