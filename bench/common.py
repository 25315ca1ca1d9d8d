"""What benchmarks share: the machine they ran on, and tables for people."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"


def machine() -> dict[str, Any]:
    """Where and when numbers were measured, and how busy it was: a busy machine is part of the result."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_1_minute": round(os.getloadavg()[0], 2),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[str | float | int | None]]) -> str:
    """Columns aligned: text to the left, numbers to the right with two decimals, "-" where there is none."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[index]) for line in [columns, *cells]) for index in range(len(columns))]
    left = [all(isinstance(row[index], str) for row in rows) for index in range(len(columns))]

    def line(values: Sequence[str]) -> str:
        padded = [
            value.ljust(width) if is_text else value.rjust(width)
            for value, width, is_text in zip(values, widths, left, strict=True)
        ]
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), *(line(row) for row in cells)])


def _cell(value: str | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
