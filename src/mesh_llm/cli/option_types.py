"""Types of options that click does not have: time spans as people type them, and numbers that are finite."""

import math
import re
from typing import Any

import click

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


class Duration(click.ParamType[float]):
    """A click type: a number and a unit, to seconds."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds of `7d` and the like; a bare number is refused, as its unit is anybody's guess."""
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)([smhdw])", str(value).strip().lower())
        if found is None or float(found[1]) == 0:
            self.fail(f"{value!r} is not a time span; write it as 30m, 12h or 7d.", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


class Number(click.FloatRange):
    """click's FloatRange, which takes `nan` for a number in every range, and `inf` where there is no upper bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """A finite number in the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number
