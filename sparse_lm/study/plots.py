"""Plots of a study: points with errors in rows, and learning curves. In the style of `sparse_lm.telemetry.svg`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from sparse_lm.study.claims import Verdict
from sparse_lm.study.measures import MEASURES, Curve
from sparse_lm.study.results import Results
from sparse_lm.study.stats import summary
from sparse_lm.study.study import BASELINE
from sparse_lm.telemetry.axes import Axis, make_scale
from sparse_lm.telemetry.colors import SERIES
from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.svg import (
    CHAR,
    GRID,
    INK,
    MARGIN,
    MUTED,
    Frame,
    Series,
    Size,
    line_chart,
    num,
    root,
    text,
    x_axis,
)

ROW = 22
Mark = Literal["dot", "square", "ring"]
# By form as well as by colour, so that they are told apart in grey.
VERDICT_MARKS: Mapping[Verdict, tuple[str, Mark]] = {
    "shown": (SERIES[2], "dot"),
    "contradicted": (SERIES[1], "square"),
    "not shown": ("#7a7a7a", "ring"),
}
# Seven colours, none of them near the baseline's, and three dashes: together they repeat after 21 lines.
_COLORS = tuple(color for color in SERIES if color != "#444444")
_DASHES = (None, "6 3", "2 3")


@dataclasses.dataclass(frozen=True)
class DotRow:
    """A row of a dot plot. points: small circles. center, low, high: the big mark and its bar; None draws none.

    mark: the form of the big one.
    """

    label: str
    points: Sequence[float]
    center: float | None
    low: float | None
    high: float | None
    color: str = SERIES[0]
    mark: Mark = "dot"


def dot_plot(rows: Sequence[DotRow], x: Axis, title: str, reference: float | None = None) -> str:
    """Values along x, one row for each name, the first on top; a dashed vertical line at `reference`.

    Raises `ValueError` without rows.
    """
    if not rows:
        raise ValueError(f"dot plot {title!r} has no rows")
    shown = [row.label if len(row.label) <= 30 else row.label[:29] + "…" for row in rows]
    size = Size(480, 12 + ROW * len(rows) + 40)
    frame = Frame(14 + CHAR * max(map(len, shown)), 8, size.width - MARGIN, size.height - 36)
    values = [v for row in rows for v in (*row.points, row.center, row.low, row.high)]
    scale = make_scale(x, [*values, reference], frame.left + 6, frame.right - 6, pad=True)
    body = [x_axis(frame, scale, x)]
    if reference is not None and scale.shows(reference):
        at = num(scale(reference))
        body.append(
            f'<line x1="{at}" x2="{at}" y1="{num(frame.top)}" y2="{num(frame.bottom)}" stroke="{INK}" '
            'stroke-width="1.2" stroke-dasharray="5 4"/>'
        )
    for i, (row, label) in enumerate(zip(rows, shown, strict=True)):
        y = frame.top + ROW * (i + 0.5)
        body.append(
            f'<line x1="{num(frame.left)}" x2="{num(frame.right)}" y1="{num(y)}" y2="{num(y)}" stroke="{GRID}"/>'
        )
        body.append(text(frame.left - 8, y + 4, label, "end", fill=INK))
        body += [
            f'<circle cx="{num(scale(v))}" cy="{num(y)}" r="2.6" fill="none" stroke="{MUTED}"/>'
            for v in row.points
            if scale.shows(v)
        ]
        if row.low is not None and row.high is not None and scale.shows(row.low) and scale.shows(row.high):
            body.append(
                f'<line x1="{num(scale(row.low))}" x2="{num(scale(row.high))}" y1="{num(y)}" y2="{num(y)}" '
                f'stroke="{row.color}" stroke-width="3"/>'
            )
        if row.center is not None and scale.shows(row.center):
            body.append(_mark(row, scale(row.center), y))
    return root(size, title, "".join(body))


def _mark(row: DotRow, x: float, y: float) -> str:
    title = f"<title>{row.center:.5g}</title>"
    if row.mark == "square":
        place = f'x="{num(x - 4.2)}" y="{num(y - 4.2)}" width="8.4" height="8.4"'
        return f'<rect {place} fill="{row.color}">{title}</rect>'
    look = f'fill="#fff" stroke="{row.color}" stroke-width="2"' if row.mark == "ring" else f'fill="{row.color}"'
    return f'<circle cx="{num(x)}" cy="{num(y)}" r="4.4" {look}>{title}</circle>'


def by_variant(results: Results, measure: str) -> Figure | None:
    """One measure of all variants: each seed, mean and standard error, with the baseline's mean as a line."""
    rows = []
    for name in results.plan.variants:
        found = results.summary(measure, name)
        if found is None:
            continue
        points = list(results.values[measure][name].values())
        error = found.standard_error or 0.0
        color = INK if name == BASELINE else SERIES[0]
        rows.append(DotRow(name, points, found.mean, found.mean - error, found.mean + error, color))
    if not rows:
        return None
    one = MEASURES[measure]
    base = results.summary(measure, BASELINE)
    title = one.label[0].upper() + one.label[1:]
    # Where everything is 0 an axis around it would speak of a negative number of dead experts.
    low = None if any(any(row.points) for row in rows) else 0.0
    svg = dot_plot(rows, Axis(f"{one.label} ({one.unit})", low=low), title, base.mean if base else None)
    caption = "Circles are seeds, the dot with its bar is mean ± standard error" + (
        ", the dashed line the dense baseline." if base else "."
    )
    return Figure(title, caption, svg)


def claim_plot(results: Results) -> list[Figure]:
    """Differences that claims are about, with their intervals, a plot for each measure."""
    rows: dict[str, list[DotRow]] = {}
    for judged in results.judged:
        for one in judged.compared:
            if not one.differences or one.comparison.b is None:
                continue
            low, high = (one.interval.low, one.interval.high) if one.interval else (None, None)
            label = f"{one.comparison.a} - {one.comparison.b}"
            mean, look = summary(one.differences).mean, VERDICT_MARKS[one.verdict]
            row = DotRow(label, one.differences, mean, low, high, *look)
            # Two claims may rest on the same comparison.
            if row not in rows.setdefault(judged.measure, []):
                rows[judged.measure].append(row)
    caption = "Circles are seeds, the bar is the bootstrap interval. Left of 0 the first is lower. "
    caption += "Green dot: shown; orange square: contradicted; grey ring: not shown."
    return [
        Figure(
            f"Claims about the {MEASURES[measure].label}",
            caption,
            dot_plot(found, Axis(f"difference ({MEASURES[measure].unit})"), f"Differences in {measure}", 0.0),
        )
        for measure, found in rows.items()
    ]


def curves(results: Results) -> Figure | None:
    """Validation loss over steps, the mean over seeds, one line for each variant that is trained."""
    series = []
    trained = [
        name
        for name in results.plan.variants
        if name == BASELINE or results.plan.study.variants[name].evaluates is None
    ]
    for i, name in enumerate(trained):
        found = [one.curve for one in results.measured[name].values() if one.curve.steps]
        if not found:
            continue
        steps, losses = mean_curve(found)
        color = INK if name == BASELINE else _COLORS[(i - 1) % len(_COLORS)]
        series.append(Series(name, steps, losses, color, markers=True, dash=_DASHES[i % len(_DASHES)]))
    if not series:
        return None
    last = max(series[0].x)
    x, y = Axis("step", low=0, high=last, integer=True), Axis("validation loss (nats / token)")
    svg = line_chart(series, x, y, "Validation loss", size=Size(480, 300))
    caption = "Mean over the finished seeds; the plot of the last values shows how far they lie apart."
    return Figure("Validation loss over steps", caption, svg)


def mean_curve(found: Sequence[Curve]) -> tuple[list[int], list[float | None]]:
    """Steps that all curves have, and the mean loss there."""
    common = sorted(set.intersection(*(set(curve.steps) for curve in found)))
    at = [dict(zip(curve.steps, curve.losses, strict=True)) for curve in found]
    return common, [statistics.fmean(losses[step] for losses in at) for step in common]


def figures(results: Results) -> list[Figure]:
    """Every figure that there are numbers for, the study's own measure first."""
    chosen = [results.plan.study.measure, "max_violation", "dropped", "dead_experts", "steps_per_second"]
    chosen += [judged.measure for judged in results.judged]
    shown = [by_variant(results, measure) for measure in dict.fromkeys(chosen)]
    main, *others = shown
    return [figure for figure in (main, *claim_plot(results), curves(results), *others) if figure is not None]
