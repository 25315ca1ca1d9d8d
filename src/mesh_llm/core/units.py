"""Sizes and times for people."""


def size(count: float) -> str:
    """Bytes as people write them, in powers of 1000: 5.6 MB, 24.0 GB; a dash for none."""
    if count <= 0:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit in {"B", "kB"} else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """A time span in its two largest units: 3m 12s, 2d 4h."""
    left = int(seconds)
    parts: list[str] = []
    for name, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        amount, left = divmod(left, length)
        if amount or (name == "s" and not parts):
            parts.append(f"{amount}{name}")
    return " ".join(parts[:2])
