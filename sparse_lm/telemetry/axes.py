"""Axes of charts: round tick values, labels that tell them apart, and the map from values to pixels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from sparse_lm.telemetry.format import compact

_PADDING = 0.04


@dataclasses.dataclass(frozen=True)
class Axis:
    """What an axis shows. label: quantity and unit. low, high: fixed ends, or None to take them from the data.

    log: logarithmic, values of 0 and below are left out. integer: ticks on whole numbers only.
    """

    label: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    integer: bool = False


@dataclasses.dataclass(frozen=True)
class Scale:
    """Maps values from `low` to `high` to pixels from `start` to `end` (which may run downwards)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value; values outside the ends land outside the pixels."""
        return self.start + self.fraction(value) * (self.end - self.start)

    def fraction(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def shows(self, value: float | None) -> bool:
        """Whether the value can be placed at all: a finite number, positive on a logarithmic axis."""
        return value is not None and math.isfinite(value) and (value > 0 or not self.log)


def make_scale(axis: Axis, values: Iterable[float | None], start: float, end: float, pad: bool = False) -> Scale:
    """The scale of `axis` for data `values`; `pad` leaves some room at the ends that the data decides.

    Without any usable value it goes from 0 to 1 (1 to 10 if logarithmic); a single value gets room on both sides.
    """
    usable = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not axis.log)]
    fixed = [end for end in (axis.low, axis.high) if end is not None]
    if not usable and len(fixed) < 2:
        usable = [fixed[0], fixed[0] + 1] if fixed and not axis.log else [1.0, 10.0] if axis.log else [0.0, 1.0]
    low = axis.low if axis.low is not None else min(usable)
    high = axis.high if axis.high is not None else max(usable)
    if axis.log:
        room = (high / low) ** _PADDING if pad else 1.0
        low, high = (low if axis.low else low / room), (high if axis.high else high * room)
        return Scale(low, high, start, end, True) if high > low else Scale(low / 2, low * 2, start, end, True)
    if high <= low:
        room = 0.5 if axis.integer else max(0.1 * abs(low), 1e-6) if low else 1.0
        return Scale(low if axis.low is not None else low - room, low + room, start, end)
    room = _PADDING * (high - low) if pad else 0.0
    return Scale(low - (room if axis.low is None else 0), high + (room if axis.high is None else 0), start, end)


def nice_ticks(low: float, high: float, count: int, integer: bool = False) -> list[float]:
    """At most `count` + 1 round values from `low` to `high`, evenly 1, 2, 2.5 or 5 times a power of ten apart.

    integer: only whole numbers, a whole number apart. Raises `ValueError` unless low < high and count >= 1.
    """
    if not low < high or count < 1:
        raise ValueError(f"ticks from {low} to {high}, {count} of them: need low < high and at least one")
    rough = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if integer else (1, 2, 2.5, 5, 10)
    step = next(f * magnitude for f in factors if f * magnitude >= rough * (1 - 1e-9))
    if integer:
        step = max(1.0, step)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    # Multiplying a decimal step collects binary dust (3 * 0.1); rounding to the step's own digits removes it.
    digits = max(0, 2 - math.floor(math.log10(step)))
    return [round(i * step, digits) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """At most about `count` values 1, 2, 5 times powers of ten (powers alone, thinned out, over many decades).

    Raises `ValueError` unless 0 < low < high.
    """
    if not 0 < low < high:
        raise ValueError(f"logarithmic ticks from {low} to {high}: need 0 < low < high")
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors, every in (((1, 2, 5), 1), ((1, 3), 1), *(((1,), every) for every in range(1, last - first + 2))):
        ticks = [float(f"{f}e{e}") for e in range(first, last + 1) if e % every == 0 for f in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) <= max(2, count):
            break
    # Less than a factor of two may hold no such value; there a logarithm is close to a line.
    return ticks if len(ticks) >= 2 else nice_ticks(low, high, max(2, count // 2))


def ticks_of(scale: Scale, count: int, integer: bool = False) -> list[float]:
    """Ticks for a scale of either kind."""
    if scale.log:
        return log_ticks(scale.low, scale.high, count)
    return nice_ticks(scale.low, scale.high, max(1, count), integer)


def tick_labels(ticks: Sequence[float], log: bool = False) -> list[str]:
    """Labels of ticks, in one common form so that they compare at a glance: 0, 10k, 20k or 0, 1e-4, 2e-4."""
    biggest = max((abs(tick) for tick in ticks), default=0.0)
    if log or biggest == 0:
        return [compact(tick) for tick in ticks]
    if biggest < 1e-3:
        exponent = math.floor(math.log10(biggest) + 1e-9)
        return _labels(ticks, 10.0**exponent, f"e{exponent}", _decimals(ticks, 10.0**exponent))
    for least, size, suffix in ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        decimals = _decimals(ticks, size)
        # 9.97k is no shorter than 9970.
        if biggest >= least and decimals <= 1:
            return _labels(ticks, size, suffix, decimals)
    return _labels(ticks, 1.0, "", _decimals(ticks, 1.0))


def _labels(ticks: Sequence[float], size: float, suffix: str, decimals: int) -> list[str]:
    return ["0" if tick == 0 else f"{tick / size:.{decimals}f}{suffix}" for tick in ticks]


def _decimals(ticks: Sequence[float], size: float) -> int:
    """How many decimals tell all of `ticks` exactly in units of `size`, at most 8."""
    return next((d for d in range(8) if all(_has_decimals(tick / size, d) for tick in ticks)), 8)


def _has_decimals(value: float, decimals: int) -> bool:
    scaled = value * 10.0**decimals
    return abs(scaled - round(scaled)) < 1e-6 * max(1.0, abs(scaled) * 1e-3)
