"""Where the two models' files are."""

from __future__ import annotations

from pathlib import Path

TINY_FILE = "tiny.gguf"
DRAFT_FILE = "tiny-draft.gguf"
PACKAGE_DATA = Path(__file__).resolve().parents[2] / "src/mesh_llm/models/builtin"
