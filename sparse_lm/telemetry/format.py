"""Numbers and durations as a person reads them; used on the terminal and on the report page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
MISSING = "-"


def compact(value: float | None, digits: int = 3) -> str:
    """`value` with `digits` significant digits and a suffix k, M, B or T: 12345 is 12.3k. None is a dash."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(float(value))
    for size, suffix in _SUFFIXES:
        # Compared after rounding: 999 950 is 1M, not 1000k.
        if float(f"{abs(value):.{digits}g}") >= size:
            return f"{_significant(value / size, digits)}{suffix}"
    return _significant(value, digits)


def _significant(value: float, digits: int) -> str:
    """At most `digits` significant digits, no trailing zeros, scientific below 1e-4: 0.000034 is 3.4e-5."""
    rounded = float(f"{value:.{digits}g}")
    if rounded == 0:
        return "0"
    if abs(rounded) < 1e-4:
        mantissa, exponent = f"{rounded:.{digits - 1}e}".split("e")
        return f"{_trim(mantissa)}e{int(exponent)}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(rounded))))
    return _trim(f"{rounded:.{decimals}f}")


def _trim(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float | None) -> str:
    """Seconds as the two largest units: 0.4s, 12s, 1m20s, 3h05m, 2d04h. None, infinite or NaN is a dash."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    minutes = round(total / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(minutes / 60)
    return f"{hours // 24}d{hours % 24:02d}h"


def percent(share: float | None, digits: int = 2) -> str:
    """A share of 1 as a percentage: 0.0123 is 1.2%. None is a dash."""
    return MISSING if share is None else f"{_significant(100 * share, digits)}%"


def grouped(value: float | None) -> str:
    """A whole number with commas between thousands: 1234567 is 1,234,567. None is a dash."""
    return MISSING if value is None else f"{round(value):,}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as Markdown, without a line break at its end; bars in cells are escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(head), line(["---"] * len(head)), *map(line, rows)])
