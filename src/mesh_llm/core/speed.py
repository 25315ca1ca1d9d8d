"""How fast a machine reads weights, which is most of what generating a token takes. Measured at the edge."""

import math

import msgspec

BYTES_PER_THREAD = 32 << 20
"""Weights below which a further CPU thread costs more in waiting for the others than it computes."""

STEPS_PER_LAYER = 18
"""Operations of one layer that wait for each other, beside reading its weights."""

_IN_CACHE = 16 << 20
_IN_MEMORY = 128 << 20


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of weights per second, while they are multiplied by one token's numbers, by the kind of weight."""

    f16: int = 0
    q8: int = 0
    q4: int = 0

    def of(self, bits: float) -> int:
        """For weights of so many bits each, on average: the nearest of the three."""
        return self.f16 if bits >= 12.0 else self.q8 if bits >= 6.8 else self.q4

    def slowed(self, factor: float) -> "Rates":
        """The same, each piece taking `factor` times as long."""
        return Rates(f16=int(self.f16 / factor), q8=int(self.q8 / factor), q4=int(self.q4 / factor))


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured on one machine, with the devices that its models use.

    Attributes:
        cores: CPU threads of `full`; 0 on accelerators, where only `full` counts.
        cached: one thread, weights that stay in the processor's cache.
        one: one thread, weights in memory.
        full: all threads or the accelerator, weights in memory.
        step_ns: nanoseconds of one small operation, on one thread.
        full_step_ns: the same on all threads, which have to wait for each other.
    """

    cores: int = 0
    cached: Rates = Rates()
    one: Rates = Rates()
    full: Rates = Rates()
    step_ns: int = 0
    full_step_ns: int = 0

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.full.f16 > 0

    def slowed(self, factor: float) -> "Speed":
        """A machine that takes `factor` times as long for everything; `factor` above 0."""
        return Speed(
            cores=self.cores,
            cached=self.cached.slowed(factor),
            one=self.one.slowed(factor),
            full=self.full.slowed(factor),
            step_ns=int(self.step_ns * factor),
            full_step_ns=int(self.full_step_ns * factor),
        )

    def seconds(self, bits: float, whole_bytes: int, read_bytes: float, layers: int) -> float:
        """Of computing one token through a part of a model.

        Args:
            bits: of each weight.
            whole_bytes: of the whole model: the number of threads goes by it.
            read_bytes: weights of the part.
            layers: of the part.
        """
        full, steps = self.full.of(bits), layers * STEPS_PER_LAYER
        threads = 1 + whole_bytes // BYTES_PER_THREAD
        if not self.cores or (threads >= self.cores > 1):
            return read_bytes / full + steps * self.full_step_ns * 1e-9
        single = self._single(bits, read_bytes)
        if threads == 1 or self.cores == 1:
            return read_bytes / single + steps * self.step_ns * 1e-9
        return read_bytes / min(threads * single, max(single, full)) + steps * self.full_step_ns * 1e-9

    def _single(self, bits: float, size: float) -> float:
        """One thread over weights of `size` bytes: between cache and memory by how much of it the cache can hold."""
        near, far = self.cached.of(bits), self.one.of(bits)
        if size <= _IN_CACHE:
            return near
        part = min(1.0, math.log(size / _IN_CACHE) / math.log(_IN_MEMORY / _IN_CACHE))
        return near ** (1.0 - part) * far**part
