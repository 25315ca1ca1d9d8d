"""Keeps QUIC's window wide enough that a token's tensor leaves at once.

QUIC sends at once only what a quarter of its window holds where the round trip is 40 ms (a burst lasts 10 ms at most),
and paces the rest. The window begins at 12 kB, shrinks with every loss, and grows only while it is full; one activation
a token never fills it, so the third packet of each would be some 5 to 11 ms late, for every token. So where the same
size comes again, filling is sent behind it that fills the window: it passes while machines compute, and is thrown away.
"""

from mesh_llm.wire.ggml_rpc.tunnel import MAX_FILLING

WIDE = 8
"""Tensors that a window is to hold: one leaves at once then, up to the 80 ms of round trip that a split may have."""

AGAIN_SECONDS = 20.0
"""A window is filled again after so long: a loss may have narrowed it."""

_MOST_SIZES = 64


class Window:
    """One way: from this machine to another."""

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._holds = 0
        self._filled_at = 0.0

    def filling(self, size: int, now: float) -> int:
        """Bytes to be sent behind a tensor of `size` bytes, mostly 0. `now`: seconds of a clock that only rises."""
        if size not in self._seen:
            # A prompt's batch comes once, and fills the window by itself where it is large.
            if len(self._seen) >= _MOST_SIZES:
                self._seen.clear()
            self._seen.add(size)
            return 0
        wanted = min(WIDE * size, MAX_FILLING)
        if size >= wanted or (wanted <= self._holds and now < self._filled_at + AGAIN_SECONDS):
            return 0
        self._holds, self._filled_at = wanted, now
        return wanted
