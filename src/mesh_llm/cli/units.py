"""Sizes and times for people."""

from mesh_llm.core.units import duration, size

__all__ = ["duration", "size"]
