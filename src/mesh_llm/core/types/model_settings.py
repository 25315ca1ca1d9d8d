"""The settings of one model, as `[models."NAME"]` of the configuration file has them. Times are seconds.

The names in the file are those of the fields, with dashes. What is not set there is as for every model of the node.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

_PART = Meta(ge=0.0, le=1.0)
_PENALTY = Meta(ge=-2.0, le=2.0)
_TEXT = Meta(max_length=64 * 1024)
_SECONDS = Meta(ge=0.0, le=10 * 365 * 86400.0)
_NAME = Meta(min_length=1, max_length=200)

Speculation: TypeAlias = Literal[
    "auto", "off", "draft", "ngram", "mtp", "eagle3",
    "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache",
]  # fmt: skip
"""How an engine may guess tokens ahead. Source: llama.cpp, common/speculative.cpp, `--spec-type`.

`auto`: chosen for each model. `draft`: by a draft model. `ngram`: by what followed the same tokens before, with
sizes that this project chose; the longer names are llama.cpp's variants as they are there. `mtp`: by the model's own
heads. `eagle3`: by a draft that reads the model's hidden states, which the user names.
"""

AUTO = "auto"
DRAFT_KINDS = {"eagle3": "draft-eagle3", "dflash": "draft-dflash", "gemma4-assistant": "draft-mtp"}
"""The kind of speculation of drafts that are made for one model, by `general.architecture`."""

_WITH_DRAFT = frozenset({"", AUTO, "draft", "eagle3"})


def takes_draft(speculation: str) -> bool:
    """Whether this kind of speculation uses a draft model, if there is one."""
    return speculation in _WITH_DRAFT


def guesses_alone(speculation: str) -> bool:
    """Whether this kind of speculation guesses without a draft model."""
    return speculation == "mtp" or speculation.startswith("ngram")


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults for requests that do not name a value themselves. None: the engine's own default."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a user fixed of an engine beside the sizes. Each difference takes another start of the engine.

    Attributes:
        sampling: defaults of requests.
        speculation: a Speculation; empty: as `auto`.
        chat_template: a template in Jinja, or the name of a built-in one; empty: the model's own.
        reasoning_budget: most tokens of reasoning; 0: none, -1: no limit, None: the engine's default.
        environment: variables of the engine's process, by name. Checked by `engine.arguments`.
        engine_args: further options of llama-server. Checked by `engine.arguments`.
    """

    sampling: Sampling = Sampling()
    speculation: str = ""
    chat_template: str = ""
    reasoning_budget: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    engine_args: tuple[str, ...] = ()


class ModelSettings(
    msgspec.Struct, frozen=True, kw_only=True, rename="kebab", forbid_unknown_fields=True, omit_defaults=True
):
    """What a user set for one model. None and empty: not set.

    Attributes:
        ctx_size: tokens of each slot.
        parallel: slots.
        cache_type: element type of the KV cache; `auto`: as it fits.
        gpu_layers: layers on the GPU; `auto`: as many as fit.
        cpu_moe: layers whose experts are in main memory; `auto`: as few as possible.
        draft: name or path of a draft model.
        draft_max: most tokens guessed at a time.
        speculation: how tokens are guessed ahead; `off`: not at all.
        mmproj: False: without its vision projector.
        temperature, top_p, top_k, min_p, repeat_penalty, presence_penalty, frequency_penalty, seed, max_tokens:
            defaults for requests that do not name them.
        system_prompt: for requests that have none.
        chat_template: a template in Jinja, or the name of a built-in one.
        reasoning_budget: most tokens of reasoning; 0: none; -1: no limit.
        aliases: further names that requests may use for it.
        ttl: unload it after so long without a request; 0: never; None: the node's rule.
        pin: never unload it to make room.
        min_lifetime: do not unload it to make room sooner than so long after its load; None: the node's rule.
        environment: variables of the engine's process.
        engine_args: further options of llama-server, each word an element.
    """

    ctx_size: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    parallel: Annotated[int, Meta(ge=1, le=256)] | None = None
    cache_type: Literal["auto", "f16", "q8_0", "q4_0"] | None = None
    gpu_layers: Annotated[int, Meta(ge=0, le=9999)] | Literal["auto"] | None = None
    cpu_moe: Annotated[int, Meta(ge=0, le=9999)] | Literal["auto"] | None = None
    draft: Annotated[str, Meta(min_length=1, max_length=4096)] | None = None
    draft_max: Annotated[int, Meta(ge=1, le=64)] | None = None
    speculation: Speculation | None = None
    mmproj: bool | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=5.0)] | None = None
    top_p: Annotated[float, _PART] | None = None
    top_k: Annotated[int, Meta(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, _PART] | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.0, le=10.0)] | None = None
    presence_penalty: Annotated[float, _PENALTY] | None = None
    frequency_penalty: Annotated[float, _PENALTY] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**32 - 1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    system_prompt: Annotated[str, _TEXT] | None = None
    chat_template: Annotated[str, _TEXT] | None = None
    reasoning_budget: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    aliases: Annotated[tuple[Annotated[str, _NAME], ...], Meta(max_length=64)] = ()
    ttl: Annotated[float, _SECONDS] | None = None
    pin: bool = False
    min_lifetime: Annotated[float, _SECONDS] | None = None
    environment: Annotated[dict[str, Annotated[str, Meta(max_length=4096)]], Meta(max_length=64)] = {}
    engine_args: Annotated[tuple[Annotated[str, Meta(max_length=4096)], ...], Meta(max_length=64)] = ()

    @property
    def engine(self) -> EngineOptions:
        """What the engine is started with beside the sizes."""
        return EngineOptions(
            sampling=Sampling(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repeat_penalty=self.repeat_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                seed=self.seed,
                max_tokens=self.max_tokens,
            ),
            speculation="" if self.speculation is None or self.speculation == AUTO else self.speculation,
            chat_template=self.chat_template or "",
            reasoning_budget=self.reasoning_budget,
            environment=tuple(sorted(self.environment.items())),
            engine_args=self.engine_args,
        )


NO_SETTINGS = ModelSettings()

SettingsByModel = Mapping[str, ModelSettings]
"""The settings of models by their names, as the user wrote these."""


def settings_of(model: str, table: SettingsByModel) -> ModelSettings:
    """The settings of a model: by its name as it is, else in any case; NO_SETTINGS without any."""
    found = table.get(model)
    if found is None and table:
        folded = model.casefold()
        found = next((settings for name, settings in table.items() if name.casefold() == folded), None)
    return found or NO_SETTINGS
