"""Bar charts and grids of small histograms as inline SVG; see `sparse_lm.telemetry.svg`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from sparse_lm.telemetry.axes import Axis, Scale, make_scale, tick_labels, ticks_of
from sparse_lm.telemetry.colors import SERIES
from sparse_lm.telemetry.svg import CHAR, GRID, INK, MARGIN, MUTED, Frame, Size, num, root, text, x_axis, y_axis

_LEFT, _GAP, _PANEL = 84, 14, 62


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Shares of equal bins; `shares` sum to 1, or are all 0 when nothing was counted."""

    shares: tuple[float, ...]


def histogram(counts: Sequence[float]) -> Histogram:
    """Counts made into shares. Raises `ValueError` without bins or with a negative count."""
    if not counts or min(counts) < 0:
        raise ValueError(f"histogram of {list(counts)}: need at least one bin and no negative count")
    total = sum(counts)
    return Histogram(tuple(count / total if total else 0.0 for count in counts))


def bar_chart(values: Sequence[float | None], x: Axis, y: Axis, title: str, color: str = SERIES[0]) -> str:
    """One bar for each of the equal bins between `x.low` and `x.high`; bars stand on 0.

    Raises `ValueError` without values.
    """
    if not values:
        raise ValueError(f"bar chart {title!r} has no values")
    size = Size()
    top, bottom = 22, size.height - 36
    y_scale = make_scale(dataclasses.replace(y, low=0.0), [0.0, *values], bottom, top, pad=True)
    ticks = ticks_of(y_scale, int((bottom - top) / 36), y.integer)
    labels = tick_labels(ticks)
    frame = Frame(14 + CHAR * max(map(len, labels)), top, size.width - MARGIN, bottom)
    x_scale = make_scale(x, [], frame.left, frame.right)
    body = y_axis(frame, y_scale, ticks, labels, y.label)
    body += _bars(values, frame, y_scale, color, gap=2.0) + x_axis(frame, x_scale, x)
    return root(size, title, body)


def _bars(values: Sequence[float | None], frame: Frame, scale: Scale, color: str, gap: float) -> str:
    width = (frame.right - frame.left) / len(values)
    parts = []
    for i, value in enumerate(values):
        if value is None or not scale.shows(value) or value <= 0:
            continue
        y = scale(value)
        # A small but real value keeps a visible sliver.
        height = max(0.6, frame.bottom - y)
        parts.append(
            f'<rect x="{num(frame.left + i * width + gap / 2)}" y="{num(frame.bottom - height)}" '
            f'width="{num(width - gap)}" height="{num(height)}" fill="{color}"><title>{value:.3g}</title></rect>'
        )
    return "".join(parts)


def histogram_grid(
    cells: Sequence[Sequence[Histogram]], rows: Sequence[str], columns: Sequence[str], x: Axis, title: str
) -> str:
    """Small histograms in rows and columns, all on one scale of shares (%) so that their heights compare.

    cells[i][j] stands in row `rows[i]` under `columns[j]`; `x.low` and `x.high` are the ends of the bins.
    Raises `ValueError` when the cells do not match the names or there are none.
    """
    if not cells or len(cells) != len(rows) or any(len(row) != len(columns) for row in cells):
        shape = [len(row) for row in cells]
        raise ValueError(f"histogram grid {title!r}: rows of {shape} cells for {len(rows)} x {len(columns)} names")
    size = Size(Size().width, 34 + len(rows) * (_PANEL + _GAP) + 22)
    most = max(100 * share for row in cells for cell in row for share in cell.shares) or 1.0
    width = (size.width - _LEFT - MARGIN - _GAP * (len(columns) - 1)) / len(columns)
    parts = [text(2, 12, "share of choices (%)")]
    for j, column in enumerate(columns):
        parts.append(text(_LEFT + j * (width + _GAP) + width / 2, 28, column, "middle", fill=INK))
    for i, row in enumerate(cells):
        top = 34 + i * (_PANEL + _GAP)
        scale = make_scale(Axis("", low=0.0), [most], top + _PANEL, top, pad=True)
        parts.append(text(2, top + _PANEL / 2 + 4, rows[i], fill=INK))
        for j, cell in enumerate(row):
            left = _LEFT + j * (width + _GAP)
            frame = Frame(left, top, left + width, top + _PANEL)
            parts.append(_panel(cell, frame, scale, x, (j == 0, i == len(cells) - 1)))
    parts.append(text((_LEFT + size.width - MARGIN) / 2, size.height - 5, x.label, "middle"))
    return root(size, title, "".join(parts))


def _panel(cell: Histogram, frame: Frame, scale: Scale, x: Axis, outer: tuple[bool, bool]) -> str:
    """One histogram; `outer` says whether it carries the labels of the y axis and of the x axis."""
    ticks = ticks_of(scale, 2)
    parts = []
    for tick, words in zip(ticks, tick_labels(ticks), strict=True):
        y = num(scale(tick))
        parts.append(f'<line x1="{num(frame.left)}" x2="{num(frame.right)}" y1="{y}" y2="{y}" stroke="{GRID}"/>')
        if outer[0]:
            parts.append(text(frame.left - 5, scale(tick) + 4, words, "end"))
    parts.append(_bars([100 * share for share in cell.shares], frame, scale, SERIES[0], gap=0.6))
    y = num(frame.bottom)
    parts.append(f'<line x1="{num(frame.left)}" x2="{num(frame.right)}" y1="{y}" y2="{y}" stroke="{MUTED}"/>')
    if outer[1]:
        along = make_scale(x, [], frame.left, frame.right)
        ends = [along.low, (along.low + along.high) / 2, along.high]
        for value, anchor in zip(ends, ("start", "middle", "end"), strict=True):
            parts.append(text(along(value), frame.bottom + 14, f"{value:g}", anchor))
    return "".join(parts)
