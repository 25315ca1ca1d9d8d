"""Further names of models that the user gave: `gpt-4o-mini` for `qwen3-30b`, or a pattern such as `claude-*`.

In a pattern, `*` stands for any characters and `?` for one.
"""

import re
from collections.abc import Mapping

MOST_LENGTH = 200
_MOST_STARS = 6
_WILD = re.compile(r"[*?]")


class AliasError(ValueError):
    """What is wrong with an alias, as a sentence."""


def check_alias(alias: object, model: object) -> None:
    """Raises AliasError unless this is an alias for a model."""
    if not isinstance(alias, str) or not isinstance(model, str):
        raise AliasError("an alias and its model are texts.")
    for text in (alias, model):
        if not 0 < len(text) <= MOST_LENGTH or not text.isprintable() or text != text.strip():
            raise AliasError(f"an alias and its model are printable names of 1 to {MOST_LENGTH} characters.")
    if alias.count("*") > _MOST_STARS:
        raise AliasError(f"a pattern has at most {_MOST_STARS} stars.")
    if _WILD.search(model):
        raise AliasError(f"{model} is a pattern: an alias means one model.")


class Aliases:
    """Aliases, with the names that they mean. In any case. Where several patterns fit, the longest counts."""

    def __init__(self, table: Mapping[str, str] | None = None) -> None:
        """`table`: alias or pattern to the model's name. Raises AliasError."""
        table = table or {}
        for alias, model in table.items():
            check_alias(alias, model)
        self.listed: dict[str, str] = {alias: model for alias, model in table.items() if not _WILD.search(alias)}
        """The aliases that are no patterns, as the user wrote them."""
        self._exact = {alias.casefold(): model for alias, model in self.listed.items()}
        patterns = sorted((alias for alias in table if alias not in self.listed), key=lambda one: (-len(one), one))
        self._patterns = [(_compiled(pattern), table[pattern]) for pattern in patterns]

    def __bool__(self) -> bool:
        return bool(self._exact or self._patterns)

    def named(self, asked: str) -> str | None:
        """What an alias means that is written out."""
        return self._exact.get(asked.casefold())

    def matched(self, asked: str) -> str | None:
        """What a pattern means that fits this name."""
        folded = asked.casefold()
        return next((model for pattern, model in self._patterns if pattern.fullmatch(folded)), None)


NO_ALIASES = Aliases()


def _compiled(pattern: str) -> re.Pattern[str]:
    pieces = (
        ".*" if piece == "*" else "." if piece == "?" else re.escape(piece)
        for piece in re.split(r"([*?])", pattern.casefold())
    )
    return re.compile("".join(pieces), re.DOTALL)
