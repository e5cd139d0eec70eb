"""Plots of laws: curves of equal FLOPs with their optima, measured points with fitted lines, how well they agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sparse_lm.config import ConfigError
from sparse_lm.scaling.fit import Fit
from sparse_lm.scaling.laws import Law
from sparse_lm.scaling.optimum import Optimum, iso_flop, needed, optimum
from sparse_lm.scaling.points import Points
from sparse_lm.telemetry.axes import Axis
from sparse_lm.telemetry.colors import SERIES, depth_color
from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.format import compact
from sparse_lm.telemetry.svg import INK, Series, line_chart

LABELS = {
    "total": "all parameters",
    "active": "parameters that a token uses",
    "total_non_embedding": "all parameters without embeddings",
    "active_non_embedding": "parameters that a token uses, without embeddings",
    "tokens": "tokens",
    "experts": "experts",
    "granularity": "granularity",
    "sparsity": "sparsity",
}
CHOICES: dict[str, tuple[float, ...]] = {
    "experts": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    "granularity": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0),
    "sparsity": (0.0, 0.5, 0.75, 0.875, 0.9375, 0.96875),
}
MOST_GROUPS = 8
_SPAN = 12.0  # an iso-FLOP curve goes from its optimum divided by this to its optimum times this
_DASHES = (None, "6 3", "2 3")


def iso_flops(law: Law, budgets: Sequence[float], fixed: Mapping[str, float]) -> Figure:
    """Loss over size, a curve for each budget, the optima joined. Raises `ConfigError` as `optimum` does."""
    best = [optimum(law, flops, **fixed) for flops in sorted(budgets)]
    series = []
    for i, one in enumerate(best):
        curve = iso_flop(law, one.flops, np.geomspace(one.size / _SPAN, one.size * _SPAN, 80), fixed)
        name, color = f"{one.flops:.3g} FLOPs", depth_color(i, len(best))
        series.append(Series(name, curve.size.tolist(), curve.loss.tolist(), color, dash=_DASHES[i % len(_DASHES)]))
    sizes, losses = [one.size for one in best], [one.loss for one in best]
    series.append(Series("compute-optimal", sizes, losses, INK, markers=True, dash="1 4"))
    caption = "Each curve spends the same training FLOPs: larger models see fewer tokens. Dots: the best size."
    if fixed:
        caption += f" At {_words(fixed)}."
    return Figure("Curves of equal FLOPs", caption, _chart(series, law.columns[0], "Curves of equal FLOPs"))


def optimal_losses(law: Law, budgets: Sequence[float], fixed: Mapping[str, float], column: str) -> Figure:
    """The loss of the best size over budgets, a line for each of the `CHOICES` of one column."""
    flops = np.geomspace(min(budgets), max(budgets) * (1 + 1e-9), 24)
    series = []
    for i, value in enumerate(CHOICES[column]):
        losses = [_loss_at(law, one, dict(fixed) | {column: value}) for one in flops]
        series.append(
            Series(f"{column} {value:g}", np.log10(flops).tolist(), losses, SERIES[i], dash=_DASHES[i % len(_DASHES)])
        )
    heading = f"Compute-optimal loss by {column}"
    caption = "Size and tokens chosen anew at every point, FLOPs counted as the law's authors do."
    svg = line_chart(series, Axis("log10 of training FLOPs"), Axis("nats / token"), heading)
    return Figure(heading, caption, _still(svg))


def _loss_at(law: Law, flops: float, fixed: Mapping[str, float]) -> float | None:
    try:
        return optimum(law, flops, **fixed).loss
    except ConfigError:  # no optimum in the searched range: a gap in the line
        return None


def agreement(fit: Fit, points: Points) -> Figure:
    """Predicted over measured loss."""
    predicted = fit.law.loss(**{name: points.columns[name] for name in fit.law.columns})
    ends = [float(np.min(points.loss)), float(np.max(points.loss))]
    series = [
        Series("equal", ends, ends, INK, dash="5 4"),
        _dots("points", points.loss, predicted, SERIES[0]),
    ]
    caption = f"Measured along x, fitted along y; the root mean square of log residuals is {fit.rmse:.2g}."
    svg = line_chart(series, Axis("measured nats / token"), Axis("fitted nats / token"), "Fitted over measured loss")
    return Figure("Fitted over measured loss", caption, _still(svg))


def fitted_lines(fit: Fit, points: Points) -> Figure:
    """Points with the fitted line through them, over tokens (else the size), a line for each group of equal others."""
    law = fit.law
    x = "tokens" if "tokens" in law.columns else law.columns[0]
    others = [name for name in law.columns if name != x]
    groups: dict[tuple[float, ...], list[int]] = {}
    for i in range(points.count):
        groups.setdefault(tuple(float(points.columns[name][i]) for name in others), []).append(i)
    keys = sorted(groups)
    shown = [keys[i] for i in np.unique(np.linspace(0, len(keys) - 1, MOST_GROUPS).round().astype(int))]
    series = []
    for i, key in enumerate(shown):
        rows, fixed = groups[key], dict(zip(others, key, strict=True))
        at = np.geomspace(np.min(points.columns[x]), np.max(points.columns[x]), 60)
        loss = law.loss(**{x: at}, **{name: np.full_like(at, value) for name, value in fixed.items()})
        name = ", ".join(f"{_short(column)} {compact(value)}" for column, value in fixed.items())
        series.append(Series(name, at.tolist(), loss.tolist(), SERIES[i], dash=_DASHES[i % len(_DASHES)]))
        series.append(_dots("", points.columns[x][rows], points.loss[rows], SERIES[i], legend=False))
    caption = f"Dots are measured, lines are fitted over all {points.count} points."
    if len(keys) > len(shown):
        caption += f" {len(shown)} of {len(keys)} groups are shown."
    return Figure("Points and fit", caption, _chart(series, x, "Points and fit"))


def figures(
    law: Law, budgets: Sequence[float], fixed: Mapping[str, float], found: tuple[Fit, Points] | None
) -> list[Figure]:
    """Every figure that the law has: of points only with a fit, of budgets only with tokens."""
    shown = [fitted_lines(*found), agreement(*found)] if found else []
    if "tokens" in law.columns:
        shown.append(iso_flops(law, budgets, fixed))
        shown += [optimal_losses(law, budgets, fixed, column) for column in needed(law)]
    return shown


def optima(law: Law, budgets: Sequence[float], fixed: Mapping[str, float]) -> list[Optimum]:
    """The best size for each budget; empty where the law has no tokens."""
    return [optimum(law, flops, **fixed) for flops in sorted(budgets)] if "tokens" in law.columns else []


def _chart(series: Sequence[Series], x: str, title: str) -> str:
    return _still(line_chart(series, Axis(f"{LABELS[x]} (log)", log=True), Axis("nats / token"), title))


def _dots(name: str, x: np.ndarray, y: np.ndarray, color: str, legend: bool = True) -> Series:
    """Points without a line between them: a gap stands after each."""
    pairs = [pair for a, b in zip(x, y, strict=True) for pair in ((float(a), float(b)), (float(a), None))]
    return Series(name, [a for a, _ in pairs], [b for _, b in pairs], color, markers=True, legend=legend)


def _still(svg: str) -> str:
    """Without the page's tooltips, whose words are about training steps."""
    return svg.replace(' data-kind="lines"', "")


def _short(column: str) -> str:
    return {"active": "N", "total": "N", "total_non_embedding": "N", "experts": "E", "granularity": "G"}.get(
        column, column
    )


def _words(fixed: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in fixed.items())
