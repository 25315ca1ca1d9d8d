"""How the engine of a launch guesses tokens ahead: what the user named, or what the model and its place allow."""

from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.types.effects import StartEngine
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import LaunchOptions, ModelKind, SplitLayout
from mesh_llm.core.types.model_settings import DRAFT_KINDS
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.engine.sources.embedded.source import NAME as EMBEDDED
from mesh_llm.engine.spec import NGRAM
from mesh_llm.models.library.library import LocalModel

OWN_HEADS = "draft-mtp"
"""llama.cpp's name for guesses by heads of the model's own (multi-token prediction), or by a draft that shares them."""

_ONE_BY_ONE = frozenset({OWN_HEADS, "draft-eagle3"})
_FEW = 4
"""Most tokens that these guess unasked: llama.cpp has them guess all, one by one, however few are wanted."""
_USUAL = LaunchOptions().draft_max

_LAYERS_PER_HEAD = 32
"""Fewest layers for each one that guesses, for its guesses unasked on one machine.

It reads each token also while nothing is guessed. That took 17 % of the time beside 12 layers, and 41 % beside 6
(`python -m bench.split.spec --spec mtp --ways solo`, idle); over slow links what it saves weighs more.
"""


@dataclass(frozen=True, kw_only=True)
class LaunchGuesses:
    """The choice.

    Attributes:
        kind: for EngineSpec.speculation.
        draft: a draft model's file.
        most: tokens at a time.
        here: last layers of a split model, which guess, that this machine's processor computes.
        while_it_pays: nobody named that kind.
        instead: why it is not the kind that the user named, and what to do, as sentences; empty if it is.
    """

    kind: str = ""
    draft: Path | None = None
    most: int = _USUAL
    here: int = 0
    while_it_pays: bool = False
    instead: str = ""


def choose_guesses(effect: StartEngine, model: LocalModel, machine: Machine, *, unfit: bool = False) -> LaunchGuesses:
    """How a launch guesses. `unfit`: an engine did not start with the model's own heads. Blocks.

    Raises:
        MeshError: `no_own_heads`; and what the settings of a model name is not here, or does not fit.
    """
    chosen, most = effect.options.engine.speculation, effect.options.draft_max
    if chosen == "mtp" and not model.facts.mtp_layers:
        raise MeshError(
            code="no_own_heads",
            message=f"{model.name} has no heads of its own that guess tokens ahead (MTP) and that this engine knows.",
            hint='Use --spec auto, or speculation = "ngram" in the settings of this model.',
            status=400,
        )
    split = effect.plan.split
    if split is not None and split.groups > 1:
        # Guesses of several engines would wait for each other, and what they gain alone is not known.
        draft, instead = _draft(effect, model, machine), ""
        if draft is None and chosen not in {"", "off"}:
            instead = f"{model.name} guesses no tokens ahead, in spite of --spec {chosen}: "
            instead += "several engines answer for this split model. Use --groups 1."
        return LaunchGuesses(draft=draft, most=most, instead=instead)
    few = _FEW if most == _USUAL else most
    refused = ""
    heads = model.facts.mtp_layers
    if heads and (chosen == "mtp" or (not chosen and (split or model.facts.layers >= _LAYERS_PER_HEAD * heads))):
        refused = "the engine did not start with its own heads" if unfit else _why_far(split, model, machine)
        if not refused:
            here = 0 if split is None or machine.accelerators else heads
            return LaunchGuesses(kind=OWN_HEADS, most=few, here=here, while_it_pays=not chosen)
    draft = _draft(effect, model, machine)
    if draft is not None:
        found = machine.registry.find(ModelName(draft.stem))
        architecture = chosen if found is None else found.facts.architecture
        kind = DRAFT_KINDS.get(architecture, "")
        return LaunchGuesses(
            kind=kind, draft=draft, most=few if kind in _ONE_BY_ONE else most, while_it_pays=not chosen
        )
    if chosen == "mtp":
        instead = f"{model.name} guesses tokens ahead by n-grams, not by --spec mtp: {refused}. "
        instead += "Use --spec auto or draft."
        return LaunchGuesses(kind=NGRAM, most=most, while_it_pays=True, instead=instead)
    if not chosen and model.facts.kind is ModelKind.CHAT:
        return LaunchGuesses(kind=NGRAM, most=most, while_it_pays=True)
    return LaunchGuesses(kind=chosen if chosen.startswith(NGRAM) else "", most=most, while_it_pays=not chosen)


def _why_far(split: SplitLayout | None, model: LocalModel, machine: Machine) -> str:
    """Why the heads of a split model would be on another machine, as a clause; empty if they are here.

    Each of their guesses would be a trip then. Measured at 20 ms over two workers: 0.67 of the rate without guesses.
    """
    if split is None:
        return ""
    if not split.host.layers:
        return f"this machine computes none of its layers, {_FAR}"
    if machine.accelerators:
        # llama.cpp gives the last layers to the last devices, which are local ones.
        return ""
    if machine.source is None or machine.source.name != EMBEDDED:
        return f"with llama.cpp of your own (--bin-dir), {_FAR}"
    if model.facts.state_bytes:
        return f"it has recurrent layers, {_FAR}"
    return "" if split.workers[-1].layers > model.facts.mtp_layers else f"the last machine has no other layers, {_FAR}"


_FAR = "so the heads of a split model are on another machine"


def _draft(effect: StartEngine, model: LocalModel, machine: Machine) -> Path | None:
    """The draft's file. Raises MeshError if a model's settings name one that is not here, or does not fit."""
    if not effect.options.use_draft:
        return None
    if effect.options.draft is not None:
        path = Path(effect.options.draft)
        if path.is_absolute():
            return path
        return Path(machine.registry.with_draft(effect.options, model).draft or path)
    draft = machine.registry.find(effect.plan.draft) if effect.plan.draft is not None else None
    return draft.path if draft is not None else None
