"""Sizes and times for people.

Plain tables.
"""

from collections.abc import Sequence

from mesh_llm.cli.output import printable
from mesh_llm.core.types.errors import duration, size

__all__ = ["duration", "size"]


_MOST_WIDTH = 60


def table(head: Sequence[str], rows: Sequence[Sequence[str]], empty: str) -> list[str]:
    """Lines of a table with its head; of `empty` alone where there are no rows. Texts are made harmless."""
    if not rows:
        return [f"  {empty}"]
    clean = [tuple(printable(text).replace("\n", " ")[:_MOST_WIDTH] for text in row) for row in [head, *rows]]
    widths = [max(len(row[column]) for row in clean) for column in range(len(head))]
    return [
        "  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in clean
    ]
