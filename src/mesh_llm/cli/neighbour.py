"""What `--yield` and `--share` say, parsed: how a node is a good neighbour of its machine's other work."""

import re
from collections.abc import Iterable

from mesh_llm.core.errors import MeshError
from mesh_llm.core.yielding import MINUTES_A_DAY, YieldPolicy

DEFAULT_LOAD = 0.5
_SPAN = re.compile(r"^(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})$")
_PERCENT = re.compile(r"^(\d{1,3}(?:\.\d+)?)\s*%$")
_HOW = "Give load, load:70%, battery, fullscreen, auto (all three), or a time as in 09:00-17:30; several by commas."


def read_yield(values: Iterable[str]) -> YieldPolicy:
    """Parse all `--yield`. Raises MeshError `options`."""
    load, battery, fullscreen = 0.0, False, False
    schedule: list[tuple[int, int]] = []
    for word in (part.strip() for value in values for part in value.split(",")):
        kind, _, limit = word.partition(":") if word.startswith("load") else (word, "", "")
        if kind == "load":
            load = read_part(limit, "--yield load") if limit else DEFAULT_LOAD
        elif word == "auto":
            load, battery, fullscreen = load or DEFAULT_LOAD, True, True
        elif word == "battery":
            battery = True
        elif word == "fullscreen":
            fullscreen = True
        elif match := _SPAN.match(word):
            schedule.append(_span(word, *(int(number) for number in match.groups())))
        else:
            raise MeshError(code="options", message=f"--yield {word} is not known.", hint=_HOW)
    return YieldPolicy(load=load, battery=battery, fullscreen=fullscreen, schedule=tuple(schedule))


def read_part(text: str, what: str) -> float:
    """Parse a part of a whole: `50%` or `0.5`. Raises MeshError `options`."""
    match = _PERCENT.match(text)
    try:
        part = float(match[1]) / 100 if match else float(text)
    except ValueError:
        part = 0.0
    if not 0.0 < part <= 1.0:
        raise MeshError(
            code="options", message=f"{what} {text} is not a part of a whole.", hint="Give it as in 50% or 0.5."
        )
    return part


def most_slots(share: float) -> int:
    """How many requests at once are planned unasked by a node that offers this part of its machine."""
    return 4 if share > 0.75 else 2 if share > 0.25 else 1


def _span(word: str, first_hour: int, first_minute: int, last_hour: int, last_minute: int) -> tuple[int, int]:
    begin, end = first_hour * 60 + first_minute, last_hour * 60 + last_minute
    if begin >= MINUTES_A_DAY or end > MINUTES_A_DAY or max(first_minute, last_minute) > 59 or begin == end:
        raise MeshError(code="options", message=f"--yield {word} is not a span of a day.", hint=_HOW)
    return begin, end
