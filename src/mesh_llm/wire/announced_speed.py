"""A machine's measured speed, as it travels: eleven small numbers, rates in megabytes per second."""

from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.speed import Rates, Speed

_UNIT = 10**6

_Small: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class _Rates(msgspec.Struct, frozen=True, array_like=True):
    f16: _Small = 0
    q8: _Small = 0
    q4: _Small = 0


class WireSpeed(msgspec.Struct, frozen=True, array_like=True):
    """core.speed.Speed, field by field; an array that may grow."""

    cores: _Small = 0
    cached: _Rates = _Rates()
    one: _Rates = _Rates()
    full: _Rates = _Rates()
    step_ns: _Small = 0
    full_step_ns: _Small = 0


def speed_out(speed: Speed) -> WireSpeed:
    """As it travels."""
    return WireSpeed(
        speed.cores,
        _rates_out(speed.cached),
        _rates_out(speed.one),
        _rates_out(speed.full),
        speed.step_ns,
        speed.full_step_ns,
    )


def speed_in(wire: WireSpeed) -> Speed:
    """The opposite."""
    return Speed(
        cores=wire.cores,
        cached=_rates_in(wire.cached),
        one=_rates_in(wire.one),
        full=_rates_in(wire.full),
        step_ns=wire.step_ns,
        full_step_ns=wire.full_step_ns,
    )


def _rates_out(rates: Rates) -> _Rates:
    return _Rates(rates.f16 // _UNIT, rates.q8 // _UNIT, rates.q4 // _UNIT)


def _rates_in(wire: _Rates) -> Rates:
    return Rates(f16=wire.f16 * _UNIT, q8=wire.q8 * _UNIT, q4=wire.q4 * _UNIT)
