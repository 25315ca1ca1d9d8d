"""Reads the corpus' texts, which are kept beside the code as TOML."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


def load(name: str) -> dict[str, Any]:
    """The content of `name`.toml."""
    return tomllib.loads(Path(__file__).with_name(f"{name}.toml").read_text("utf-8"))
