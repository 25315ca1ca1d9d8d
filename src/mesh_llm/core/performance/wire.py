"""In which format the activations of a split model travel (`--wire`), and how fast it is predicted to be so.

Fewer bytes round what the machines compute with, so they are taken unasked only where they gain something that a user
notices: where a link and not a machine is what a prompt or a token waits for. Eight bits are never taken unasked.
"""

from collections.abc import Mapping

from mesh_llm.core.performance.prediction import (
    FLOAT_BYTES,
    PROMPT_TOKENS,
    Links,
    SplitSeconds,
    split_prompt_seconds,
    split_seconds,
)
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import AUTO_WIRE, ModelFacts, Speed, SplitLayout, Wire, WireFormat

WIRE_GAIN = 1.1
"""How many times as fast prompts, or tokens, must be predicted with f16 before it is taken unasked."""

_KEPT_GAIN = 1.05
"""The same for f16 that is taken already."""

ELEMENT_BYTES: Mapping[WireFormat, float] = {"f32": FLOAT_BYTES, "f16": 2.0, "q8": 1.0 + 2.0 / 32.0}
"""Of an element as it travels. q8 has a scale of two bytes for 32 elements."""


def fixed_wire(setting: str) -> Wire | None:
    """What a setting of the user says by itself; None for `auto`."""
    for name in ELEMENT_BYTES:
        if setting == name:
            return Wire(prompts=name, tokens=name)
    return None


def choose_wire(
    setting: str,
    facts: ModelFacts,
    layout: SplitLayout,
    speeds: Mapping[NodeId, Speed],
    links: Links,
    present: Wire = Wire(),  # noqa: B008 - frozen
) -> Wire:
    """The formats for a layout: what the user set, or with `auto` f16 where that gains enough.

    What cannot be predicted travels as it is. `present`: what was chosen before, which stays where the gain is near the
    limit, so that it does not change with every measurement.
    """
    fixed = fixed_wire(setting)
    if fixed is not None or setting != AUTO_WIRE:
        return fixed or Wire()

    def gains(exact: SplitSeconds | None, rounded: SplitSeconds | None, before: WireFormat) -> bool:
        least = WIRE_GAIN if before == "f32" else _KEPT_GAIN
        return exact is not None and rounded is not None and exact.total() >= least * rounded.total()

    half = Wire(prompts="f16", tokens="f16")
    arguments = facts, layout, speeds, links
    prompts = gains(wired_prompt_seconds(*arguments, Wire()), wired_prompt_seconds(*arguments, half), present.prompts)
    tokens = gains(wired_seconds(*arguments, Wire()), wired_seconds(*arguments, half), present.tokens)
    return Wire(prompts="f16" if prompts else "f32", tokens="f16" if tokens else "f32")


def wired_seconds(
    facts: ModelFacts,
    layout: SplitLayout,
    speeds: Mapping[NodeId, Speed],
    links: Links,
    wire: Wire,
    context: int = 0,
) -> SplitSeconds | None:
    """As `prediction.split_seconds`, with activations that travel so."""
    return split_seconds(facts, layout, speeds, links, ELEMENT_BYTES[wire.tokens], context)


def wired_prompt_seconds(
    facts: ModelFacts,
    layout: SplitLayout,
    speeds: Mapping[NodeId, Speed],
    links: Links,
    wire: Wire,
    tokens: int = PROMPT_TOKENS,
    start: int = 0,
) -> SplitSeconds | None:
    """As `prediction.split_prompt_seconds`, with activations that travel so."""
    return split_prompt_seconds(facts, layout, speeds, links, tokens, ELEMENT_BYTES[wire.prompts], start)
