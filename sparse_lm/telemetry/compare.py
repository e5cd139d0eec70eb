"""Runs side by side: the loss curves of several in one figure."""

from __future__ import annotations

from collections.abc import Mapping

from sparse_lm.telemetry.axes import Axis
from sparse_lm.telemetry.colors import SERIES
from sparse_lm.telemetry.figures import MARKED, POINTS, Figure
from sparse_lm.telemetry.rundata import RunData, smooth, thin, verdict
from sparse_lm.telemetry.svg import Reference, Series, line_chart


def compare_losses(runs: Mapping[str, RunData]) -> Figure:
    """Training losses as running means (dashed) and validation losses of runs, by the names that they are shown under.

    Where all of them know the same lowest possible loss it is drawn. Raises `ValueError` when no run has a loss yet.
    """
    series: list[Series] = []
    for i, (name, run) in enumerate(runs.items()):
        color = SERIES[i % len(SERIES)]
        for split, dash in (("train", "2 3"), ("validation", None)):
            if not run.has("loss", split):
                continue
            steps, values = run.column("loss", split)
            values = smooth(values, len(values) // 50) if split == "train" else values
            markers = split == "validation" and len(steps) <= MARKED
            series.append(Series(f"{name}, {split}", *thin(steps, values, POINTS), color, markers=markers, dash=dash))
    if not series:
        raise ValueError(f"no loss to compare: the runs {sorted(runs)} have logged none; train some steps first")
    best = {verdict(run).best_loss for run in runs.values()}
    (bound,) = best if len(best) == 1 else (None,)
    references = [] if bound is None else [Reference("best possible", bound)]
    last = max(run.last_step for run in runs.values())
    svg = line_chart(
        series, Axis("step", low=0, high=last, integer=True), Axis("nats / token"), "Losses over steps", references
    )
    found = {name: verdict(run).validation_loss for name, run in runs.items()}
    words = ", ".join(f"{name} {loss:.3f}" for name, loss in found.items() if loss is not None)
    caption = "Cross-entropy per predicted token; lower is better."
    return Figure("Loss", f"{caption} Last validation: {words}." if words else caption, svg)
