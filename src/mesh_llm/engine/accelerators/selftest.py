"""Decides whether a plugin may be loaded: it computes operators and a short text, and the processor does the same.

Everything runs in children (`selftest_main.py`): what crashes or hangs ends a child, and says what it was doing.
"""

import asyncio
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.engine.accelerators.selftest_main import Operator, Text
from mesh_llm.engine.process import Captured, python_module, run
from mesh_llm.engine.sources.embedded.loading import LOAD

CODE = "accelerator_self_test_failed"
NO_DEVICE = "accelerator_no_device"

OPERATOR_SECONDS = 900.0
TEXT_SECONDS = 900.0
"""Drivers compile their programs at first use: minutes on a slow or busy machine."""

_TOLERANCE = 1e-5
_TOLERANCES = {"MUL_MAT": 5e-4, "FLASH_ATTN_EXT": 5e-4}
"""Of the normalised mean squared error. A wrong kernel is off by 1; rounding to 8 or 16 bits by 1e-5."""
_NEEDED = "MUL_MAT"
"""What a device must support, with every type of the test."""
_PROBABILITY = 0.05
"""By how much the probability of a token may differ."""

_MODULE = "mesh_llm.engine.accelerators.selftest_main"


@dataclass(frozen=True, kw_only=True)
class Passed:
    """A passed test: the devices' ids, how many operators were compared, and tokens that were equal."""

    devices: tuple[str, ...]
    operators: int
    tokens: int

    @property
    def text(self) -> str:
        """For people."""
        return f"tested on {', '.join(self.devices)}: {self.operators} operators, {self.tokens} tokens of text"


def self_test(library: Path, model: Path | None, say: Callable[[str], None]) -> Passed:
    """Test a plugin. Blocks, for seconds on a GPU, for minutes where a driver compiles slowly.

    Args:
        library: the plugin.
        model: a small one, for the text; None leaves the text out.
        say: gets a sentence at each step.

    Raises:
        MeshError: `accelerator_self_test_failed` with what was wrong; `accelerator_no_device`, if it finds no card.
    """
    say("Testing operators against the processor.")
    argv, env = python_module(_MODULE, "operators", str(library))
    lines = _lines(asyncio.run(run(argv, env, OPERATOR_SECONDS)))
    devices, compared = check_operators(lines)
    tokens = 0
    if model is not None:
        say("Testing a short text against the processor.")
        tokens = compare_texts(_text(model, None), _text(model, library))
    return Passed(devices=devices, operators=compared, tokens=tokens)


def check_operators(found: list[Operator]) -> tuple[tuple[str, ...], int]:
    """The devices, and how many operators were right. Raises MeshError."""
    devices = tuple(dict.fromkeys(one.device for one in found))
    results = [one for one in found if not one.started]
    wrong = [one for one in results if one.error > _tolerance(one.name)]
    if wrong:
        named = ", ".join(f"{one.name} on {one.device}" for one in wrong)
        raise _failed(f"it computes wrong results: {named}")
    lacking = [one for one in results if one.error < 0 and one.name.startswith(_NEEDED)]
    if lacking:
        raise _failed(f"it does not compute {', '.join(one.name for one in lacking)}")
    return devices, sum(one.error >= 0 for one in results)


def compare_texts(wanted: Text, got: Text) -> int:
    """How many tokens are the same from the beginning. Raises MeshError if a probability differs by too much.

    Rounding may decide between two tokens that are equally likely. From there on the texts have nothing in common.
    """
    for place, (right, other) in enumerate(zip(wanted.tokens, got.tokens, strict=False)):
        for token, logarithm in right.likeliest.items():
            difference = abs(math.exp(logarithm) - math.exp(other.likeliest.get(token, -math.inf)))
            if not difference <= _PROBABILITY:
                raise _failed(f"its text differs from the processor's at token {place + 1}")
        if right.id != other.id:
            return place
    if len(wanted.tokens) != len(got.tokens):
        raise _failed(f"its text has {len(got.tokens)} tokens, and the processor's {len(wanted.tokens)}")
    return len(wanted.tokens)


def _tolerance(name: str) -> float:
    return _TOLERANCES.get(name.split(maxsplit=1)[0], _TOLERANCE)


def _lines(done: Captured) -> list[Operator]:
    found: list[Operator] = []
    for line in done.stdout.splitlines():
        try:
            found.append(msgspec.json.decode(line, type=Operator))
        except UNREADABLE:
            continue
    if done.code != 0:
        doing = f"at {found[-1].name} on {found[-1].device}" if found else "when it is loaded"
        raise _failed(f"{_end_of(done, doing)}")
    if not found:
        raise MeshError(
            code=NO_DEVICE,
            message="The plugin works, and finds no GPU that it can use.",
            hint="Install the card's driver, and let this user open it: `mesh-llm doctor` tells more.",
            status=503,
        )
    return found


def _end_of(done: Captured, doing: str) -> str:
    if done.code is None:
        return f"it hangs {doing} ({done.last_lines(1)})"
    if done.code < 0:
        return f"it crashes {doing} ({signal.Signals(-done.code).name}): {done.last_lines()}"
    return f"it fails {doing}: {done.last_lines()}"


def _text(model: Path, library: Path | None) -> Text:
    load = () if library is None else (LOAD, str(library))
    argv, env = python_module(_MODULE, "text", str(model), *load)
    done = asyncio.run(run(argv, env, TEXT_SECONDS))
    try:
        return msgspec.json.decode(done.stdout, type=Text)
    except UNREADABLE as error:
        raise _failed(_end_of(done, "at a short text")) from error


def _failed(why: str) -> MeshError:
    return MeshError(
        code=CODE,
        message=f"The plugin is set aside, and the processor serves: {why}.",
        hint="Update the card's driver, then run `mesh-llm engine install --force`.",
        status=503,
    )
