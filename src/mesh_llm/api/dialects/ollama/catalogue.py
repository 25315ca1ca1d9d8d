"""Describes the mesh's models as Ollama describes those on its disk. Pure: what is read from files is an argument."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from mesh_llm.api.json_values import Json
from mesh_llm.core.routing.ranking import ModelRoute
from mesh_llm.core.types.model import ModelFacts, ModelKind, ModelStatus

VERSION = "0.24.0"
"""The version of Ollama's API that this one follows. Clients ask for it to learn what they may use."""

_PINNED = timedelta(days=106_751)
"""Ollama's span for a model that stays loaded: the longest that Go can express."""


class Props(msgspec.Struct):
    """What an engine says about the model that it serves (llama.cpp's `/props`)."""

    chat_template: str = ""
    chat_template_caps: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    modalities: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    model_ftype: str = ""


_THINKING = re.compile(r"<think|reasoning_content|enable_thinking|reasoning_effort|<\|channel\|>|thinking")


def can_think(props: Props) -> bool:
    """Whether a model writes its reasoning before its answer, by its template."""
    return _THINKING.search(props.chat_template) is not None


def capabilities(kind: ModelKind, props: Props | None, metadata: Mapping[str, object]) -> list[str]:
    """What a model can do, in Ollama's words. `metadata`: of its file, where that is here."""
    if kind is ModelKind.EMBEDDING:
        return ["embedding"]
    if kind is not ModelKind.CHAT:
        return []
    found = ["completion"]
    if props is not None:
        found += [name for name in ("vision", "audio") if props.modalities.get(name) is True]
        if props.chat_template_caps.get("supports_tools") is True or "tools" in props.chat_template:
            found.append("tools")
    if any(key.startswith("tokenizer.ggml.fim_mid") or key == "tokenizer.ggml.middle_token_id" for key in metadata):
        found.append("insert")
    if props is not None and can_think(props):
        found.append("thinking")
    return found


def tagged(name: str) -> str:
    """A model's name with a tag, as all of Ollama's names have one."""
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def listed(routes: Iterable[ModelRoute], facts: Mapping[str, ModelFacts], modified: Mapping[str, float]) -> list[Json]:
    """The entries of `/api/tags`.

    Args:
        routes: the models to list.
        facts: what is known of a model's file, by name.
        modified: UNIX seconds of a file that is here, by name.
    """
    return [
        _entry(route, facts.get(route.name)) | {"modified_at": moment(modified.get(route.name, float(route.created)))}
        for route in sorted(routes, key=lambda route: (route.status is not ModelStatus.WARM, route.name))
    ]


def running(routes: Iterable[ModelRoute], facts: Mapping[str, ModelFacts], now: datetime, *, gpu: bool) -> list[Json]:
    """The entries of `/api/ps`: the models that answer at once. `gpu`: this node computes on a GPU."""
    return [
        _entry(route, facts.get(route.name))
        | {
            "expires_at": timestamp(now + _PINNED),
            "size_vram": 0 if not gpu and any(target.local for target in route.targets) else route.size_bytes,
            "context_length": route.context,
        }
        for route in sorted(routes, key=lambda route: route.name)
        if route.status is ModelStatus.WARM
    ]


def shown(
    route: ModelRoute, facts: ModelFacts | None, metadata: Mapping[str, object], props: Props | None, modified: float
) -> Json:
    """The answer of `/api/show`.

    `<architecture>.context_length` is the context that a request can use here, where the model is served: clients take
    it for the largest `num_ctx`, and here nobody can ask for more.
    """
    details = _details(route, facts, props)
    count = metadata.get("general.parameter_count")
    if isinstance(count, int):
        details["parameter_size"] = human_number(count)
    # Clients look for the context below the architecture's name, also where a client node does not know it.
    family = details["family"] or "unknown"
    info: Json = {"general.architecture": family}
    if facts is not None:
        info |= {
            f"{family}.block_count": facts.layers,
            f"{family}.context_length": facts.context_train,
            f"{family}.embedding_length": facts.embedding_length,
            f"{family}.vocab_size": facts.vocabulary,
        }
    info |= {key: value for key, value in metadata.items() if key not in ("general.name", "tokenizer.chat_template")}
    if route.context:
        info[f"{family}.context_length"] = route.context
    return {
        "license": "",
        "modelfile": f"# The mesh serves this model; it has no Modelfile.\nFROM {route.name}\n",
        "parameters": f"{'num_ctx':<30} {route.context}" if route.context else "",
        "template": props.chat_template if props is not None else "",
        "details": details,
        "model_info": info,
        "capabilities": capabilities(route.kind, props, metadata),
        "modified_at": moment(modified or float(route.created)),
    }


def moment(seconds: float) -> str:
    """UNIX seconds as Ollama writes a time."""
    return timestamp(datetime.fromtimestamp(max(0.0, seconds), UTC))


def timestamp(time: datetime) -> str:
    """A time as Ollama writes it (RFC 3339)."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _entry(route: ModelRoute, facts: ModelFacts | None) -> Json:
    name = tagged(route.name)
    # Ollama's digest is that of a manifest. This one is equal for equal files under one name.
    content = facts.fingerprint if facts is not None and facts.fingerprint else str(route.size_bytes)
    return {
        "name": name,
        "model": name,
        "size": route.size_bytes,
        "digest": hashlib.sha256(f"{route.name}\0{content}".encode()).hexdigest(),
        "details": _details(route, facts, None),
    }


def _details(route: ModelRoute, facts: ModelFacts | None, props: Props | None) -> Json:
    family = facts.architecture if facts is not None else ""
    return {
        "parent_model": "",
        "format": "gguf",
        "family": family,
        "families": [family] if family else [],
        "parameter_size": parameter_size(route.name, facts),
        "quantization_level": quantization(route.name, facts, props),
        **({"context_length": route.context} if route.context else {}),
        **({"embedding_length": facts.embedding_length} if facts is not None and facts.embedding_length else {}),
    }


_SIZE = re.compile(r"(?:^|[-_.:/ ])((?:\d{1,3}x)?\d{1,4}(?:\.\d{1,3})?[bm])(?=$|[-_.:/ ])", re.IGNORECASE)
_QUANT = re.compile(
    r"(?:^|[-_.:/ ])(i?q\d(?:_[0-9a-z]{1,3}){0,2}|tq\d_\d|bf16|f16|fp16|f32|mxfp4(?:_moe)?)(?=$|[-_.:/ ])",
    re.IGNORECASE,
)
_BY_BITS = ((32.0, "F32"), (16.0, "F16"), (8.5, "Q8_0"), (6.56, "Q6_K"))
_STEPS = {"Small": "_S", "Medium": "_M", "Large": "_L"}


def parameter_size(name: str, facts: ModelFacts | None) -> str:
    """How many parameters a model has, as in `7.6B`: by its name, else by the size of its file; empty: not known."""
    found = _SIZE.search(name)
    if found is not None:
        return found[1].upper().replace("X", "x")
    if facts is None or facts.weight_bits <= 0.0:
        return ""
    return human_number(facts.size_bytes * 8 / facts.weight_bits)


def human_number(count: float) -> str:
    """A number as Ollama writes it: `7.6B`, `137M`."""
    for unit, letter, digits in ((1e9, "B", 1), (1e6, "M", 0), (1e3, "K", 0)):
        if count >= unit:
            return f"{count / unit:.{digits}f}{letter}"
    return f"{count:.0f}"


def named_quantization(name: str) -> str:
    """How a model is quantised, as its name says; empty: it says nothing."""
    found = _QUANT.search(name)
    return "" if found is None else found[1].upper().replace("FP16", "F16")


def quantization(name: str, facts: ModelFacts | None, props: Props | None) -> str:
    """How a model is quantised, as in `Q4_K_M`: as its engine says, by its name, or by its bits per weight."""
    if props is not None and props.model_ftype:
        # As in `Q4_K - Medium`, `all F32`, `(guessed) IQ4_XS - 4.25 bpw` (llama.cpp, `llama_ftype_name`).
        kind, _, rest = props.model_ftype.replace("(guessed)", "").replace("all ", "").strip().partition(" - ")
        return kind.partition(" ")[0] + _STEPS.get(rest.partition(" ")[0], "")
    if named := named_quantization(name):
        return named
    bits = facts.weight_bits if facts is not None else 0.0
    return next((word for wanted, word in _BY_BITS if abs(bits - wanted) < 0.05), "unknown")
