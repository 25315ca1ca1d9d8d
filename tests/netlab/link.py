"""One direction of a link, as arithmetic: when does a packet that enters now come out at the other end?

Pure: time and the seed are arguments, so tests run it in virtual time. Seconds and bytes throughout.
"""

import random
from dataclasses import asdict, dataclass, fields, replace

DEFAULT_QUEUE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class LinkSettings:
    """What a direction of a link does to packets."""

    delay: float = 0.0
    """One-way propagation time, seconds."""
    jitter: float = 0.0
    """Up to this many seconds more, uniformly drawn for each packet; packets keep their order."""
    loss: float = 0.0
    """Probability that a packet is lost, 0 to 1."""
    rate: float | None = None
    """Bytes per second that the link takes in; None is without limit."""
    queue_bytes: int = DEFAULT_QUEUE_BYTES
    """With a rate: bytes that may wait before the link; a packet beyond is dropped, as a router would."""
    tcp: bool = True
    """False: TCP packets are dropped, as a firewall does that says nothing."""

    def __post_init__(self) -> None:
        if self.delay < 0 or self.jitter < 0:
            raise ValueError(f"delay and jitter must not be negative: {self}")
        if not 0 <= self.loss <= 1:
            raise ValueError(f"loss is a probability between 0 and 1, not {self.loss}")
        if self.rate is not None and self.rate <= 0:
            raise ValueError(f"rate must be positive; to stop a link, cut it: {self}")
        if self.queue_bytes < 0:
            raise ValueError(f"queue_bytes must not be negative: {self}")

    def changed(self, values: dict[str, float | bool | None]) -> "LinkSettings":
        """These settings with some fields replaced; unknown names raise TypeError."""
        return replace(self, **values)  # type: ignore[arg-type]


@dataclass(slots=True)
class LinkCounters:
    """What a direction of a link has done since the lab began."""

    packets: int = 0
    """Packets that came out at the other end."""
    bytes: int = 0
    """Bytes of those packets, IP headers included."""
    lost: int = 0
    """Packets dropped by `loss`."""
    overflowed: int = 0
    """Packets dropped because the queue before the rate limit was full."""
    cut_off: int = 0
    """Packets that entered while the link was cut, or were on it when it was."""

    def __add__(self, other: "LinkCounters") -> "LinkCounters":
        return LinkCounters(
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


class Link:
    """The state of one direction: call `admit` for each packet, in order of time, and `arrived` when it is due."""

    def __init__(self, settings: LinkSettings, seed: str) -> None:
        self.settings = settings
        self.counters = LinkCounters()
        self.up = True
        self.era = 0
        """Rises with every cut: a packet admitted in an earlier era was on the wire when it broke."""
        # Two generators, so that the packets lost for a seed do not depend on whether there is jitter.
        self._loss_draws = random.Random(f"loss {seed}")
        self._jitter_draws = random.Random(f"jitter {seed}")
        self._free_at = 0.0
        self._last_arrival = 0.0

    def cut(self) -> None:
        """Break the link: nothing enters, and what is on it never arrives."""
        self.up = False
        self.era += 1
        self._free_at = 0.0
        self._last_arrival = 0.0

    def heal(self) -> None:
        """Undo `cut`."""
        self.up = True

    def admit(self, now: float, size: int) -> float | None:
        """When a packet of `size` bytes that enters at `now` arrives, or None when it never does."""
        settings = self.settings
        if not self.up:
            self.counters.cut_off += 1
            return None
        arrival = now
        if settings.rate is not None:
            starts = max(now, self._free_at)
            if (starts - now) * settings.rate > settings.queue_bytes:
                self.counters.overflowed += 1
                return None
            self._free_at = arrival = starts + size / settings.rate
        # A lost packet has used the sender's line: that is why this comes after the rate.
        if settings.loss and self._loss_draws.random() < settings.loss:
            self.counters.lost += 1
            return None
        arrival += settings.delay
        if settings.jitter:
            arrival += self._jitter_draws.random() * settings.jitter
            arrival = max(arrival, self._last_arrival)
            self._last_arrival = arrival
        return arrival

    def arrived(self, era: int, size: int) -> bool:
        """Whether a packet admitted in `era` still comes out, now that it is due; counts it either way."""
        if era != self.era:
            self.counters.cut_off += 1
            return False
        self.counters.packets += 1
        self.counters.bytes += size
        return True
