"""What of a request forbids that its answer is continued, and how much of its limit is left."""

from typing import Any, TypeAlias, cast

import msgspec

Json: TypeAlias = dict[str, Any]

_MOST_TOKENS = 2**53


class Cannot(msgspec.Struct, frozen=True):
    """An answer cannot be continued. `reason` completes "it cannot be continued: …"."""

    reason: str


def mapping(value: object) -> Json:
    """The value, if it is a JSON object; else an empty one."""
    return cast("Json", value) if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """The value, if it is a JSON array; else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def text(value: object) -> str:
    """The value, if it is a string; else an empty one."""
    return value if isinstance(value, str) else ""


def count(value: object) -> int | None:
    """The value as a number of tokens, if it is one that can be."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _MOST_TOKENS:
        return None
    return int(value)


def forbidden(request: Json) -> str:
    """What in any dialect's request forbids to continue; empty: nothing."""
    if any((count(request.get(name)) or 1) > 1 for name in ("n", "n_cmpl", "best_of")):
        return "several answers were asked for at once"
    if any(request.get(name) not in (None, False, 0) for name in ("logprobs", "top_logprobs", "n_probs")):
        return "the probabilities of its tokens were asked for"
    if _repeatable(request) and not greedy(request):
        return "it was drawn from a seed, and would be drawn otherwise from its middle on"
    if request.get("grammar"):
        return "a grammar of the request's own binds it from its beginning on"
    if any(name in request for name in ("continue_final_message", "add_generation_prompt", "echo")):
        return "its request says by itself how a message is continued"
    return ""


def _repeatable(request: Json) -> bool:
    seed = count(request.get("seed"))
    return seed is not None and seed >= 0


def greedy(request: Json) -> bool:
    """Whether nothing is left to chance."""
    temperature = count(request.get("temperature"))
    return request.get("top_k") == 1 or (temperature is not None and float(request["temperature"]) <= 0.0)


def limits(request: Json, names: tuple[str, ...]) -> dict[str, int]:
    """The limits of an answer's length that a request sets; not those that mean no limit."""
    found = {name: count(request.get(name)) for name in names}
    return {name: limit for name, limit in found.items() if limit is not None and limit >= 0}
