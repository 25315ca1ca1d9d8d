"""What the split benchmark found, as a table and as a plot.

A way is measured in several passes, each next to what it is compared with: what counts is the median of the passes'
ratios, since a machine's speed changes from minute to minute, and with it that of all ways.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from bench.common import table

WAYS = {
    "solo": "on one machine",
    "stock": "llama.cpp RPC over TCP",
    "relayed": "mesh-llm without push",
    "pushed": "mesh-llm",
    "pushed+draft": "mesh-llm with draft",
}
_COLOURS = {"solo": "#8a8a8a", "stock": "#d1495b", "relayed": "#edae49", "pushed": "#00798c", "pushed+draft": "#30638e"}


@dataclass
class Result:
    """One way over one delay; of several passes, their medians.

    Attributes:
        ring_ms: the sum of one-way delays around; 0 for solo.
        load_bytes: on the wire, as all bytes here.
        passes: of which this is the median, in order; those of all ways of a delay belong together.
    """

    way: str
    delay_ms: float
    ring_ms: float
    ms_per_token: float
    load_s: float
    load_bytes: int = 0
    load_round_trips: int | None = None
    bytes_per_token: float = 0
    round_trips_per_token: float | None = None
    predicted_ms: float | None = None
    same_tokens: bool = True
    passes: list["Result"] = field(default_factory=list["Result"])

    @property
    def tokens_per_s(self) -> float:
        """Of one request."""
        return 1000 / self.ms_per_token


def joined(passes: Sequence[Result]) -> Result:
    """The passes of one way over one delay, as one."""
    first = passes[0]
    predicted = [r.predicted_ms for r in passes if r.predicted_ms is not None]
    return replace(
        first,
        ms_per_token=median(r.ms_per_token for r in passes),
        load_s=median(r.load_s for r in passes),
        load_bytes=round(median(r.load_bytes for r in passes)),
        bytes_per_token=median(r.bytes_per_token for r in passes),
        predicted_ms=median(predicted) if predicted else None,
        same_tokens=all(r.same_tokens for r in passes),
        passes=list(passes),
    )


def solo_of(results: Sequence[Result], delay: float) -> Result:
    """One machine, as measured next to what is compared with it."""
    return next(r for r in results if r.way == "solo" and r.delay_ms == delay)


def against_ring(result: Result, solo: Result) -> float:
    """Times the ring's latency and one machine's time together."""
    pairs = zip(result.passes, solo.passes, strict=True)
    return median(r.ms_per_token / (r.ring_ms + alone.ms_per_token) for r, alone in pairs)


def off(result: Result) -> float | None:
    """How far the predicted rate is above what came, as a part of that; None where nothing was predicted."""
    ratios = [r.ms_per_token / r.predicted_ms for r in result.passes if r.predicted_ms is not None]
    return median(ratios) - 1 if ratios else None


def text(results: Sequence[Result]) -> str:
    """For people."""
    columns = (
        "one-way ms", "way", "tokens/s", "ms/token", "ring ms", "x (ring + solo)", "predicted tokens/s", "off %",
        "trips/token", "bytes/token", "load s", "load bytes", "load trips", "same",
    )  # fmt: skip
    rows: list[tuple[str | float | int | None, ...]] = []
    for r in results:
        against = against_ring(r, solo_of(results, r.delay_ms))
        predicted = None if r.predicted_ms is None else 1000 / r.predicted_ms
        wrong = off(r)
        rows.append((
            f"{r.delay_ms:g}", WAYS[r.way], r.tokens_per_s, r.ms_per_token, r.ring_ms, against, predicted,
            None if wrong is None else round(100 * wrong),
            r.round_trips_per_token, round(r.bytes_per_token), r.load_s, r.load_bytes, r.load_round_trips,
            "yes" if r.same_tokens else "NO",
        ))  # fmt: skip
    return table(columns, rows)


def bars(results: Sequence[Result], cold_bytes: int, *, large: bool) -> list[str]:
    """What was to be reached, and whether it was.

    Args:
        results: of one run.
        cold_bytes: a stock load without a cache.
        large: the model is the large one, which two of the bars are meant for: tokens of small ones are all overhead.
    """
    found: list[str] = []
    by_way = {(r.way, r.delay_ms): r for r in results}

    def judge(what: str, value: float, bar: float, *, least: bool) -> None:
        good = value >= bar if least else value <= bar
        found.append(f"{'reached' if good else 'MISSED '}  {what}: {value:,.2f} ({'>=' if least else '<='} {bar:,.2f})")

    ours = by_way.get(("pushed", 20.0))
    if ours is not None:
        judge("20 ms, against ring + solo", against_ring(ours, solo_of(results, 20.0)), 1.15, least=False)
    near, stock = by_way.get(("pushed", 0.0)), by_way.get(("stock", 0.0))
    if large and near is not None and stock is not None:
        pairs = zip(near.passes, stock.passes, strict=True)
        rate = median(theirs.ms_per_token / mine.ms_per_token for mine, theirs in pairs)
        judge("0 ms, tokens/s against stock", rate, 0.9, least=True)
    if large and near is not None and cold_bytes:
        judge("load bytes, stock against ours", cold_bytes / max(1, near.load_bytes), 1000.0, least=True)
    for way in ("solo", "pushed"):
        wrong = [abs(found_off) for r in results if r.way == way and (found_off := off(r)) is not None]
        if wrong:
            judge(f"prediction of {WAYS[way]}, furthest off", max(wrong), 0.3, least=False)
    if not all(r.same_tokens for r in results):
        found.append("MISSED   tokens differ from those on one machine")
    return found


def plot(results: Sequence[Result], title: str) -> str:
    """Milliseconds per token over the one-way delay, as SVG."""
    width, height, left, top, right, bottom = 760, 440, 70, 50, 210, 60
    delays = sorted({r.delay_ms for r in results})
    most = max(r.ms_per_token for r in results) * 1.05

    def x(delay: float) -> float:
        return left + (width - left - right) * (delay - delays[0]) / max(1e-9, delays[-1] - delays[0])

    def y(value: float) -> float:
        return height - bottom - (height - top - bottom) * value / most

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<g font-family="sans-serif"><text x="{left}" y="24" font-size="15">{title}</text>',
    ]
    step = _step(most)
    for number in range(int(most // step) + 1):
        value = number * step
        parts.append(
            f'<path d="M{left} {y(value):.1f}H{width - right}" stroke="#e4e4e4"/>'
            f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>'
        )
    parts += [
        f'<text x="{x(delay):.1f}" y="{height - bottom + 18}" text-anchor="middle">{delay:g}</text>' for delay in delays
    ]
    parts.append(
        f'<text x="{(left + width - right) / 2}" y="{height - 16}" text-anchor="middle">one-way delay, ms</text>'
    )
    turned = f'x="18" y="{height / 2}" transform="rotate(-90 18 {height / 2})"'
    parts.append(f'<text {turned} text-anchor="middle">ms per token</text>')
    ideal = [
        (
            delay,
            solo_of(results, delay).ms_per_token
            + next((r.ring_ms for r in results if r.delay_ms == delay and r.ring_ms), 0.0),
        )
        for delay in delays
    ]
    lines = [("ring + solo", "#000000", "4 4", ideal)]
    for way, name in WAYS.items():
        points = [(r.delay_ms, r.ms_per_token) for r in results if r.way == way]
        lines.append((name, _COLOURS[way], "", points))
    for number, (name, colour, dashes, points) in enumerate(line for line in lines if line[3]):
        path = "M" + "L".join(f"{x(delay):.1f} {y(value):.1f}" for delay, value in points)
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>')
        parts += [f'<circle cx="{x(delay):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>' for delay, value in points]
        at = top + 20 * number
        parts.append(
            f'<path d="M{width - right + 16} {at}h24" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'
            f'<text x="{width - right + 46}" y="{at + 4}">{name}</text>'
        )
    return "\n".join([*parts, "</g></svg>\n"])


def _step(most: float) -> float:
    """A round distance of some six lines."""
    for step in (5, 10, 20, 25, 50, 100, 200, 250, 500, 1000):
        if most / step <= 7:
            return step
    return most / 6
