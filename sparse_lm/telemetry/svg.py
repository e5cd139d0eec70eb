"""Charts as inline SVG: lines, heat maps, bars and grids of histograms. Valid XML, no scripts, no outside files.

Every chart is a string with one `<svg>` element that scales with its container. `data-` attributes tell the page's
tooltip script how to turn pixels back into values.
"""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Sequence
from html import escape

import numpy as np

from sparse_lm.telemetry.axes import Axis, Scale, make_scale, tick_labels, ticks_of
from sparse_lm.telemetry.colors import MISSING_LEVEL, ColorScale, data_uri, png

INK, MUTED, GRID = "#222222", "#5a5a5a", "#e4e4e4"
CHAR = 6.3  # generous mean width of a character at font size 11, in pixels
_LINE = 16
_REFERENCE_DASHES = ("5 4", "1.5 3", "9 3 2 3")
MARGIN = 26  # right of the plot: half of the widest tick label, which may stand at its very end


@dataclasses.dataclass(frozen=True)
class Series:
    """A line: `y` over `x`, both of the same length; None and NaN leave a gap.

    faint: drawn pale and thin, behind, and without deciding the y range beyond its bulk. markers: a dot per point.
    legend: whether it is named in the legend.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    color: str
    faint: bool = False
    markers: bool = False
    legend: bool = True
    dash: str | None = None

    def __post_init__(self):
        if len(self.x) != len(self.y):
            raise ValueError(f"series {self.name!r} has {len(self.x)} x and {len(self.y)} y; they must be as many")


@dataclasses.dataclass(frozen=True)
class Reference:
    """A dashed horizontal line at `value` with its name in the legend; the first three differ in their dashes."""

    name: str
    value: float


@dataclasses.dataclass(frozen=True)
class Size:
    """Width and height of a chart in the units of its viewBox; text is 11 units high."""

    width: int = 480
    height: int = 260


@dataclasses.dataclass(frozen=True)
class Frame:
    """Pixels of the plotting area within the chart."""

    left: float
    top: float
    right: float
    bottom: float


def num(value: float) -> str:
    """A coordinate with at most one decimal, as short as possible."""
    text = f"{value:.1f}"
    return text[:-2] if text.endswith(".0") else text


def text(x: float, y: float, words: str, anchor: str = "start", fill: str = MUTED, extra: str = "") -> str:
    """A text element; `words` are escaped."""
    end = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text x="{num(x)}" y="{num(y)}" fill="{fill}"{end}{extra}>{escape(words)}</text>'


def root(size: Size, title: str, body: str, data: str = "") -> str:
    """The `<svg>` element around a chart, white so that it is read on a dark page too; `data`: further attributes."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {size.width} {size.height}" role="img" '
        f'aria-label="{escape(title)}" font-family="system-ui, sans-serif" font-size="11" '
        f'style="background:#fff"{data}>{body}</svg>'
    )


def line_chart(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    title: str,
    references: Sequence[Reference] = (),
    size: Size = Size(),
) -> str:
    """Lines over a common x axis, with a legend when there is more than one thing to name."""
    names = [(s.name, s.color, 'stroke-opacity="0.28"' if s.faint else _dash(s.dash)) for s in series if s.legend]
    dashes = [_dash(_REFERENCE_DASHES[i % len(_REFERENCE_DASHES)]) for i in range(len(references))]
    names += [(r.name, INK, dash) for r, dash in zip(references, dashes, strict=True)]
    legend, legend_height = _legend(names, size.width) if len(names) > 1 or references else ("", 0)
    solid = [v for s in series if not s.faint for v in s.y] + [r.value for r in references]
    values = solid + [v for s in series if s.faint for v in _bulk(s.y)]
    top, bottom = legend_height + 20, size.height - 36
    y_scale = make_scale(y, values, bottom, top, pad=True)
    y_ticks = ticks_of(y_scale, int((bottom - top) / 36), y.integer)
    y_labels = tick_labels(y_ticks, y_scale.log)
    frame = Frame(14 + CHAR * max(map(len, y_labels), default=1), top, size.width - MARGIN, bottom)
    x_scale = make_scale(x, [v for s in series for v in s.x], frame.left, frame.right)
    body = [legend, y_axis(frame, y_scale, y_ticks, y_labels, y.label), x_axis(frame, x_scale, x)]
    lines = [_reference(r, dash, y_scale, frame) for r, dash in zip(references, dashes, strict=True)]
    lines += [_line(s, x_scale, y_scale) for s in sorted(series, key=lambda s: not s.faint)]
    body.append(_clipped(frame, "".join(lines)))
    return root(size, title, "".join(body), _data("lines", frame, x_scale, y_scale))


def _bulk(values: Sequence[float | None]) -> list[float]:
    """The 1st and the 99th percentile: a single spike of a faint line must not flatten everything else."""
    there = np.array([v for v in values if v is not None and np.isfinite(v)])
    return [float(v) for v in np.percentile(there, [1, 99])] if there.size else []


def _line(series: Series, x_scale: Scale, y_scale: Scale) -> str:
    points, commands, pen_down = [], [], False
    for x, y in zip(series.x, series.y, strict=True):
        if y is None or not y_scale.shows(y) or not x_scale.shows(x):
            pen_down = False
            continue
        point = f"{num(x_scale(x))},{num(y_scale(y))}"
        # A line of no length with a round cap draws a dot, so that a point between two gaps is seen.
        commands.append(f"L{point}" if pen_down else f"M{point}L{point}")
        points.append(point)
        pen_down = True
    if not points:
        return ""
    look = 'stroke-opacity="0.28" stroke-width="1"' if series.faint else 'stroke-width="1.8"'
    path = (
        f'<path class="series" data-name="{escape(series.name)}" d="{"".join(commands)}" fill="none" '
        f'stroke="{series.color}" {look} {_dash(series.dash)} stroke-linejoin="round" stroke-linecap="round"/>'
    )
    if not series.markers:
        return path
    dots = (point.split(",") for point in points)
    return path + "".join(f'<circle cx="{cx}" cy="{cy}" r="2.6" fill="{series.color}"/>' for cx, cy in dots)


def _reference(reference: Reference, dash: str, scale: Scale, frame: Frame) -> str:
    if not scale.shows(reference.value):
        return ""
    y = num(scale(reference.value))
    return (
        f'<line x1="{num(frame.left)}" x2="{num(frame.right)}" y1="{y}" y2="{y}" stroke="{INK}" '
        f'stroke-width="1.2" {dash}/>'
    )


def _clipped(frame: Frame, body: str) -> str:
    """An inner svg element clips without the document-wide ids that a clipPath needs; 3 pixels keep dots whole."""
    x, y = num(frame.left - 3), num(frame.top - 3)
    w, h = num(frame.right - frame.left + 6), num(frame.bottom - frame.top + 6)
    return f'<svg x="{x}" y="{y}" width="{w}" height="{h}" viewBox="{x} {y} {w} {h}">{body}</svg>'


def _data(kind: str, frame: Frame, x: Scale, y: Scale) -> str:
    plot = " ".join(num(v) for v in (frame.left, frame.top, frame.right, frame.bottom))
    ends = [f"{s.low:.7g} {s.high:.7g} {int(s.log)}" for s in (x, y)]
    return f' data-kind="{kind}" data-plot="{plot}" data-x="{ends[0]}" data-y="{ends[1]}"'


def _dash(pattern: str | None) -> str:
    return f'stroke-dasharray="{pattern}"' if pattern else ""


def _legend(names: Sequence[tuple[str, str, str]], width: float) -> tuple[str, float]:
    """(name, colour, stroke attributes) in rows that wrap; returns the elements and their height."""
    x, row, parts = 2.0, 0, []
    for name, color, look in names:
        shown = name if len(name) <= 40 else name[:39] + "…"
        needed = 22 + CHAR * len(shown) + 16
        if x > 2 and x + needed > width:
            x, row = 2.0, row + 1
        y = 11 + _LINE * row
        parts.append(
            f'<line x1="{num(x)}" x2="{num(x + 16)}" y1="{y - 4}" y2="{y - 4}" stroke="{color}" '
            f'stroke-width="2.4" {look}/>' + text(x + 22, y, shown, fill=INK)
        )
        x += needed
    return "".join(parts), _LINE * (row + 1) + 4


def y_axis(frame: Frame, scale: Scale, ticks: Sequence[float], labels: Sequence[str], label: str) -> str:
    """Grid lines, tick labels at the left, and the label above them."""
    parts = [text(2, frame.top - 8, label)]
    for tick, words in zip(ticks, labels, strict=True):
        y = scale(tick)
        parts.append(
            f'<line x1="{num(frame.left)}" x2="{num(frame.right)}" y1="{num(y)}" y2="{num(y)}" stroke="{GRID}"/>'
        )
        parts.append(text(frame.left - 6, y + 4, words, "end"))
    return "".join(parts)


def x_axis(frame: Frame, scale: Scale, axis: Axis) -> str:
    """Base line, ticks as many as fit, and the label below them."""
    ticks = ticks_of(scale, max(2, int((frame.right - frame.left) / 70)), axis.integer)
    parts = [
        f'<line x1="{num(frame.left)}" x2="{num(frame.right)}" y1="{num(frame.bottom)}" y2="{num(frame.bottom)}" '
        f'stroke="{MUTED}"/>'
    ]
    for tick, words in zip(ticks, tick_labels(ticks, scale.log), strict=True):
        x = num(scale(tick))
        parts.append(
            f'<line x1="{x}" x2="{x}" y1="{num(frame.bottom)}" y2="{num(frame.bottom + 4)}" stroke="{MUTED}"/>'
        )
        parts.append(text(scale(tick), frame.bottom + 16, words, "middle"))
    parts.append(text((frame.left + frame.right) / 2, frame.bottom + 31, axis.label, "middle"))
    return "".join(parts)


def heat_map(
    ratios: np.ndarray,
    x: Axis,
    y: Axis,
    title: str,
    colors: ColorScale = ColorScale(),  # noqa: B008 - frozen
    size: Size = Size(360, 220),
) -> str:
    """Ratios as colours, row 0 at the top. ratios: [rows, columns], NaN where missing; `x.low` and `x.high` are needed.

    Raises `ValueError` when there is no cell or when the x axis has no ends.
    """
    if ratios.ndim != 2 or 0 in ratios.shape or x.low is None or x.high is None:
        raise ValueError(f"heat map {title!r} of shape {ratios.shape}, x from {x.low} to {x.high}: need cells and ends")
    rows, columns = ratios.shape
    y_scale = Scale(-0.5, rows - 0.5, 22, size.height - 36)
    ticks = ticks_of(Scale(0, max(1, rows - 1), 0, 1), max(1, min(rows, int((size.height - 58) / 18))), True)
    ticks = [tick for tick in ticks if tick <= rows - 1]
    labels = tick_labels(ticks)
    frame = Frame(14 + CHAR * max(map(len, labels)), 22, size.width - MARGIN, size.height - 36)
    x_scale = make_scale(x, [], frame.left, frame.right)
    levels = colors.levels(ratios)
    place = f'x="{num(frame.left)}" y="{num(frame.top)}" width="{num(frame.right - frame.left)}" '
    body = [
        text(2, 12, y.label),
        f'<image {place}height="{num(frame.bottom - frame.top)}" preserveAspectRatio="none" '
        f'style="image-rendering:pixelated" href="{data_uri(png(levels, colors.palette()))}"/>',
        *(text(frame.left - 6, y_scale(t) + 4, words, "end") for t, words in zip(ticks, labels, strict=True)),
        x_axis(frame, x_scale, x),
    ]
    cells = base64.b64encode(levels.tobytes()).decode()
    data = f' data-cells="{cells}" data-rows="{rows}" data-columns="{columns}" data-most="{colors.most:g}"'
    return root(size, title, "".join(body), _data("heat", frame, x_scale, y_scale) + data)


def color_legend(colors: ColorScale, label: str, size: Size = Size(360, 46)) -> str:
    """The colours of a scale with their ratios: the ends and 1 are always named."""
    left, right = 8.0, size.width - float(MARGIN)
    strip = data_uri(png(np.arange(MISSING_LEVEL, dtype=np.uint8)[None], colors.palette()))
    body = [
        text(left, 11, label, fill=INK),
        f'<image x="{num(left)}" y="17" width="{num(right - left)}" height="11" preserveAspectRatio="none" '
        f'href="{strip}"/>',
    ]
    for ratio in (1 / colors.most, colors.most**-0.5, 1.0, colors.most**0.5, colors.most):
        sign = "≤ " if ratio == 1 / colors.most else "≥ " if ratio == colors.most else ""
        anchor = "start" if sign == "≤ " else "end" if sign else "middle"
        body.append(text(left + colors.share(ratio) * (right - left), 41, f"{sign}{ratio:.3g}", anchor))
    return root(size, label, "".join(body))
