"""The figures of a report about a run as a whole: losses, domains, optimization, throughput. Routing: see `routing`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from sparse_lm.telemetry.axes import Axis
from sparse_lm.telemetry.colors import SERIES
from sparse_lm.telemetry.rundata import RunData, Verdict, get, number, smooth, thin
from sparse_lm.telemetry.svg import Reference, Series, line_chart

POINTS = 600  # a line is not drawn with more points than about one a pixel
MARKED = 40  # lines of so few points get dots


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with its heading and a sentence that says how to read it. svg: one `<svg>` element."""

    heading: str
    caption: str
    svg: str


def step_axis(run: RunData) -> Axis:
    """The x axis of everything over time, the same for all figures of a run; from 0 unless it was resumed elsewhere."""
    steps = [row["step"] for row in (*run.train, *run.validation)]
    low, high = min(steps, default=0), max(steps, default=1)
    return Axis("step", low=0 if low <= high // 20 else low, high=high, integer=True)


def raw_and_smooth(run: RunData, key: str, name: str, factor: float = 1.0) -> list[Series]:
    """The rows of `key` as a faint line, and their running mean over 1/25 of the run; few rows as they are."""
    steps, raw = run.column(key)
    values = [None if value is None else factor * value for value in raw]
    if len(values) <= MARKED:
        return [Series(name, steps, values, SERIES[0], markers=True)]
    mean = smooth(values, len(values) // 50)
    return [
        Series(f"{name} (each row)", *thin(steps, values, POINTS), SERIES[0], faint=True),
        Series(f"{name} (running mean)", *thin(steps, mean, POINTS), SERIES[0]),
    ]


def losses(run: RunData, bottom: Verdict) -> Figure | None:
    """Training and validation loss, with the lowest possible loss where the data's entropy is known."""
    series = raw_and_smooth(run, "loss", "train") if run.has("loss") else []
    if run.has("loss", "validation"):
        steps, values = run.column("loss", "validation")
        series.append(Series("validation", *thin(steps, values, POINTS), SERIES[1], markers=len(steps) <= MARKED))
    if not series:
        return None
    references = [] if bottom.best_loss is None else [Reference("best possible", bottom.best_loss)]
    caption = "Cross-entropy per predicted token; lower is better."
    if references:
        caption += f" The entropy of the data, {bottom.best_loss:.3f} nats, bounds it from below."
    svg = line_chart(series, step_axis(run), Axis("nats / token"), "Loss over steps", references)
    return Figure("Loss", caption, svg)


def domain_names(run: RunData) -> list[str]:
    """Domains in the order of their newest validation loss, the hardest first."""
    newest = get(run.validation[-1], "losses_by_domain") if run.validation else None
    if not isinstance(newest, dict):
        return []
    return sorted(newest, key=lambda name: -(number(newest[name]) or 0.0))


def domains(run: RunData) -> Figure | None:
    """Validation loss of each domain over steps."""
    names = domain_names(run)
    if not names:
        return None
    rows = [row for row in run.validation if isinstance(row.get("losses_by_domain"), dict)]
    steps = [row["step"] for row in rows]
    series = []
    for name, color in zip(names, SERIES, strict=False):
        values = [number(row["losses_by_domain"].get(name)) for row in rows]
        series.append(Series(name, *thin(steps, values, POINTS), color, markers=len(steps) <= MARKED))
    caption = "One model, each domain of the validation data by itself."
    if len(names) > len(series):
        caption += f" The {len(series)} hardest of {len(names)} domains; the table below has all."
    svg = line_chart(series, step_axis(run), Axis("nats / token"), "Validation loss by domain")
    return Figure("Validation loss by domain", caption, svg)


def optimization(run: RunData) -> list[Figure]:
    """Learning rate, gradient norm and throughput, as far as the rows have them."""
    cards: Sequence[tuple[str, str, str, Axis, float]] = (
        ("learning_rate", "Learning rate", "What the schedule asked for at each step.", Axis("per step", low=0.0), 1.0),
        (
            "gradient_norm",
            "Gradient norm",
            "Global norm before clipping, logarithmic: spikes here come before spikes of the loss.",
            Axis("norm (log)", log=True),
            1.0,
        ),
        (
            "tokens_per_second",
            "Throughput",
            "Tokens trained on per second, compilation and evaluation left out.",
            Axis("tokens / s", low=0.0),
            1.0,
        ),
        (
            "mfu",
            "Model FLOPs utilisation",
            "FLOPs that the model needs over those that the devices could do.",
            Axis("%", low=0.0),
            100.0,
        ),
    )
    figures = []
    for key, heading, caption, axis, factor in cards:
        if run.has(key):
            name = heading.lower() if heading != "Model FLOPs utilisation" else "utilisation"
            exact = key == "learning_rate"
            series = _exact(run, key, name) if exact else raw_and_smooth(run, key, name, factor)
            figures.append(Figure(heading, caption, line_chart(series, step_axis(run), axis, heading)))
    return figures


def _exact(run: RunData, key: str, name: str) -> list[Series]:
    steps, values = run.column(key)
    return [Series(name, *thin(steps, values, POINTS), SERIES[0], markers=len(steps) <= MARKED)]


def present(*makers: Callable[[], Figure | None]) -> list[Figure]:
    """The figures that there are rows for."""
    return [figure for make in makers if (figure := make()) is not None]
