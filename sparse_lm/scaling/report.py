"""A law or a fit written down: fit.json with every number, report.html and plots/*.svg to look at, tables as text."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sparse_lm.config import ConfigError
from sparse_lm.scaling.fit import Fit
from sparse_lm.scaling.laws import EXPANSION, Granularity, Law
from sparse_lm.scaling.optimum import Optimum, best_granularity, costly, needed, optimum
from sparse_lm.scaling.plots import LABELS, figures, optima
from sparse_lm.scaling.points import Points
from sparse_lm.scaling.published import PUBLISHED
from sparse_lm.telemetry.format import compact
from sparse_lm.telemetry.page import cards, page, table, tile
from sparse_lm.telemetry.sinks import plain, replace_file

JSON_NAME, PAGE_NAME, PLOTS_NAME = "fit.json", "report.html", "plots"
BUDGETS = (1e20, 1e21, 1e22)
FIXED = {"experts": 8.0, "granularity": 8.0, "sparsity": 0.875}
MOST_RESAMPLES = 100  # of the bootstrap whose optima are searched


@dataclasses.dataclass(frozen=True)
class Report:
    """law: published, or of the fit. fixed: the columns that are not traded. found: the fit and its points, or None.

    intervals: for each optimum, of its size and tokens over the bootstrap; None without one.
    """

    law: Law
    budgets: tuple[float, ...]
    fixed: Mapping[str, float]
    optima: tuple[Optimum, ...]
    intervals: tuple[tuple[np.ndarray, np.ndarray] | None, ...]
    found: tuple[Fit, Points] | None
    command: str = ""


def make_report(
    law: Law,
    found: tuple[Fit, Points] | None = None,
    budgets: Sequence[float] = (),
    fixed: Mapping[str, float] | None = None,
    command: str = "",
) -> Report:
    """What is there to say of a law. budgets, fixed: left out, those of the points (see `budgets_of`), else `BUDGETS`.

    Raises `ConfigError` when `fixed` has columns that the law has not, or an optimum is out of range.
    """
    given, points = dict(fixed or {}), found[1] if found else None
    for name, value in given.items():
        if name not in costly(law):
            raise ConfigError(name, value, f"the law {law.kind} does not depend on it; leave it out")
    names = [name for name in costly(law) if name in needed(law) or (points is not None and name in points.columns)]
    filled = {name: _typical(points, name) for name in names} | given
    spent = tuple(budgets) or (budgets_of(law, points, filled) if points else BUDGETS)
    if isinstance(law, Granularity) and "granularity" not in given:
        expansion = filled.get("experts", EXPANSION)
        best = tuple(best_granularity(law, flops, expansion) for flops in sorted(spent))
        filled["granularity"] = best[len(best) // 2].fixed["granularity"]
    else:
        best = tuple(optima(law, spent, filled))
    intervals = tuple(_interval(found[0] if found else None, one) for one in best)
    return Report(law, spent, filled, best, intervals, found, command)


def budgets_of(law: Law, points: Points, fixed: Mapping[str, float]) -> tuple[float, ...]:
    """The least, the middle and the largest budget of the points, and ten times that; empty without tokens."""
    if "tokens" not in law.columns:
        return ()
    spent = law.flops_per_token(points.columns[law.columns[0]], fixed) * points.columns["tokens"]
    low, high = float(np.min(spent)), float(np.max(spent))
    return (low, float(np.sqrt(low * high)), high, 10 * high)


def _typical(points: Points | None, column: str) -> float:
    """The median of what was measured, one of its values."""
    if points is None:
        return FIXED[column]
    return float(np.sort(points.columns[column])[points.count // 2])


def _interval(fit: Fit | None, best: Optimum) -> tuple[np.ndarray, np.ndarray] | None:
    if fit is None or not fit.resamples:
        return None
    drawn = []
    for law in fit.resamples[:MOST_RESAMPLES]:
        try:
            one = optimum(law, best.flops, **best.fixed)
        except ConfigError:  # a resample that leaves size or tokens without effect has no optimum: as wide as can be
            drawn.append((np.nan, np.nan))
        else:
            drawn.append((one.size, one.tokens))
    sizes = np.array(drawn)
    if np.all(np.isnan(sizes)):
        return None
    tail = (1 - fit.confidence) / 2
    low, high = np.nanquantile(sizes, (tail, 1 - tail), axis=0)
    return np.array([low[0], high[0]]), np.array([low[1], high[1]])


def coefficient_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each coefficient, and of a fit its interval and what the paper has."""
    if report.found is None:
        return ["coefficient", "value"], [[name, f"{value:.4g}"] for name, value in report.law.values().items()]
    fit = report.found[0]
    published = PUBLISHED[report.law.kind].values()
    confidence = f"{100 * fit.confidence:g} %"
    rows = []
    for name, value in report.law.values().items():
        one = fit.intervals.get(name)
        interval = f"{one.low:.4g} to {one.high:.4g}" if one else "-"
        rows.append([name, f"{value:.4g}", interval, f"{published[name]:.4g}"])
    return ["coefficient", "value", confidence, "published"], rows


def optimum_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Head and rows: the best size for each budget."""
    head = ["training FLOPs", LABELS[report.law.columns[0]], "tokens", "nats / token"]
    head += list(report.optima[0].fixed) if report.optima else []
    head += ["size from", "to", "tokens from", "to"] if any(report.intervals) else []
    rows = []
    for one, interval in zip(report.optima, report.intervals, strict=True):
        row = [f"{one.flops:.3g}", compact(one.size), compact(one.tokens), f"{one.loss:.4f}"]
        row += [f"{value:g}" for value in one.fixed.values()]
        if any(report.intervals):
            row += [compact(float(end)) for ends in interval for end in ends] if interval else ["-"] * 4
        rows.append(row)
    return head, rows


def summary(report: Report) -> str:
    """The tables as text."""
    fit = report.found[0] if report.found else None
    lines = [f"{report.law.kind}: {type(report.law).source}"]
    if fit:
        lines.append(
            f"{fit.points} points, root mean square of log residuals {fit.rmse:.2g}, "
            f"{fit.agreeing} of {fit.descents} descents end in the same minimum"
        )
        lines += [undetermined(fit)] if fit.at_bounds else []
    lines += _aligned(*coefficient_rows(report))
    if report.optima:
        lines += ["", "compute-optimal:", *_aligned(*optimum_rows(report))]
    return "\n".join(lines)


def undetermined(fit: Fit) -> str:
    """A sentence about the coefficients that ended at a bound."""
    return (
        f"at a bound of the fit, and not determined by these points: {', '.join(fit.at_bounds)}; measure more points, "
        "over a wider range, or fit a law with fewer coefficients"
    )


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]


def to_json(report: Report) -> dict[str, Any]:
    """Every number."""
    values: dict[str, Any] = {
        "law": report.law.kind,
        "source": type(report.law).source,
        "columns": list(report.law.columns),
        "coefficients": report.law.values(),
        "fixed": dict(report.fixed),
        "optima": [
            dataclasses.asdict(one)
            | {"size_interval": interval and interval[0].tolist(), "tokens_interval": interval and interval[1].tolist()}
            for one, interval in zip(report.optima, report.intervals, strict=True)
        ],
        "command": report.command,
    }
    if report.found:
        fit, points = report.found
        predicted = fit.law.loss(**{name: points.columns[name] for name in fit.law.columns})
        values["fit"] = {
            "points": fit.points,
            "objective": fit.objective,
            "rmse": fit.rmse,
            "at_bounds": list(fit.at_bounds),
            "agreeing": fit.agreeing,
            "descents": fit.descents,
            "confidence": fit.confidence,
            "resamples": len(fit.resamples),
            "intervals": {name: [one.low, one.high] for name, one in fit.intervals.items()},
        }
        values["points"] = [
            {"label": points.labels[i] if points.labels else str(i + 1), "fitted": float(predicted[i])}
            | {name: float(points.columns[name][i]) for name in fit.law.columns}
            | {"loss": float(points.loss[i])}
            for i in range(points.count)
        ]
    return plain(values)


def render(report: Report) -> str:
    """The page as HTML."""
    fit = report.found[0] if report.found else None
    law = report.law
    parts = [f"<h1>Scaling law: {escape(law.kind)}</h1>", f'<p class="muted">{escape(type(law).source)}</p>']
    form = (type(law).__doc__ or "").split("\n\n")[0]
    parts.append(f"<p>{escape(form)}</p>")
    if fit:
        tiles = [
            tile("Points", str(fit.points), f"{len(law.values())} coefficients"),
            tile("Residual", f"{100 * fit.rmse:.2g} %", "root mean square, of the loss"),
            tile("Same minimum", f"{fit.agreeing} / {fit.descents}", "of descents; few: not determined"),
            tile("Bootstrap", str(len(fit.resamples)), f"resamples, {100 * fit.confidence:g} % intervals"),
        ]
        parts.append(f'<div class="tiles">{"".join(tiles)}</div>')
        parts += [f"<p>{escape(undetermined(fit).capitalize())}.</p>"] if fit.at_bounds else []
    parts.append(cards(figures(law, report.budgets, report.fixed, report.found)))
    parts += ["<h2>Coefficients</h2>", table(*coefficient_rows(report), numeric=(1, 2, 3))]
    if report.optima:
        parts += ["<h2>Compute-optimal sizes</h2>", table(*optimum_rows(report), numeric=tuple(range(12)))]
        parts.append('<p class="muted">Beyond the budgets that were measured these are extrapolations.</p>')
    parts += [f"<p><code>{escape(report.command)}</code></p>"] if report.command else []
    return page(f"{law.kind} - sparse_lm", "\n".join(parts))


def write_report(report: Report, directory: Path) -> Path:
    """Writes fit.json, report.html and plots/*.svg; returns the page's path. Raises `ConfigError` where it cannot."""
    try:
        (directory / PLOTS_NAME).mkdir(parents=True, exist_ok=True)
        for figure in figures(report.law, report.budgets, report.fixed, report.found):
            name = re.sub(r"[^a-z0-9]+", "_", figure.heading.lower()).strip("_")
            replace_file(directory / PLOTS_NAME / f"{name}.svg", figure.svg.encode())
        replace_file(directory / JSON_NAME, (json.dumps(to_json(report), indent=2) + "\n").encode())
        replace_file(directory / PAGE_NAME, render(report).encode())
    except OSError as error:
        raise ConfigError(
            "workdir", str(directory), f"cannot be written ({error}); choose another directory"
        ) from error
    return directory / PAGE_NAME
