"""The figures of a report about routing: load, drops, entropy, gates, balance. All from rows of a sparse run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sparse_lm.telemetry.axes import Axis
from sparse_lm.telemetry.bars import Histogram, bar_chart, histogram, histogram_grid
from sparse_lm.telemetry.colors import ColorScale, depth_color
from sparse_lm.telemetry.figures import MARKED, POINTS, Figure, raw_and_smooth, step_axis
from sparse_lm.telemetry.rundata import RunData, get, number, resample, thin
from sparse_lm.telemetry.svg import Reference, Series, heat_map, line_chart

_MOST_CELLS = 200_000  # over all heat maps; a cell takes up to 3 bytes of the page
_MOST_COLUMNS = 200
_MOST_LAYERS = 8  # lines of one chart, rows of the gate grid
_IDLE = 0.1  # an expert below this share of an even load is called idle
LOAD_COLORS = ColorScale(4.0)


def is_sparse(run: RunData) -> bool:
    """Whether the run has any routing to report."""
    return bool(run.layers) or any(
        run.has(key) for key in ("max_violation", "load_balance", "router_entropy", "attention_load_balance")
    )


def layer_array(run: RunData, key: str) -> tuple[list[int], np.ndarray]:
    """Steps, and `layers.<key>` of the rows that have it in the newest row's shape; [rows, ...], NaN for null."""
    rows = [row for row in run.layers if get(row, "layers", key)]
    arrays = [np.array(row["layers"][key], dtype=float) for row in rows]
    same = [i for i, array in enumerate(arrays) if array.shape == arrays[-1].shape]
    if not same:
        return [], np.empty((0,))
    return [rows[i]["step"] for i in same], np.stack([arrays[i] for i in same])


def chosen_layers(count: int) -> list[int]:
    """At most eight of `count` layers, evenly spread, the first and the last among them."""
    if count <= _MOST_LAYERS:
        return list(range(count))
    return sorted({round(i * (count - 1) / (_MOST_LAYERS - 1)) for i in range(_MOST_LAYERS)})


def load_maps(run: RunData) -> list[Figure]:
    """A heat map per layer with experts, in its feed-forward part and in its attention: loads over steps."""
    return _load_maps(run, "load", "MoE layer") + _load_maps(run, "attention_load", "Attention of layer")


def _load_maps(run: RunData, key: str, what: str) -> list[Figure]:
    """Each expert's load relative to an even one."""
    steps, load = layer_array(run, key)
    if not steps:
        return []
    _, layers, experts = load.shape
    columns = max(1, min(len(steps), _MOST_COLUMNS, _MOST_CELLS // (layers * experts)))
    ratios = resample(steps, load * experts, columns)
    tail = load[-max(1, len(steps) // 10) :].mean(axis=0) * experts
    # One recorded step has no extent in time; a step on either side gives it some.
    ends = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 1, steps[0] + 1)
    x = Axis("step", low=ends[0], high=ends[1], integer=True)
    figures = []
    for layer in range(layers):
        name = f"{what} {layer + 1}"
        low, high, idle = tail[layer].min(), tail[layer].max(), int((tail[layer] < _IDLE).sum())
        caption = f"In the end between {low:.2f} and {high:.2f} times an even load"
        caption += f"; {idle} of {experts} experts idle." if idle else "."
        title = f"Expert load of {name} over steps"
        figures.append(Figure(name, caption, heat_map(ratios[:, layer].T, x, Axis("expert"), title, LOAD_COLORS)))
    return figures


def idle_experts(run: RunData) -> tuple[int, int] | None:
    """Experts (over all layers) under a tenth of an even load in the last tenth of the records, and all experts."""
    steps, load = layer_array(run, "load")
    if not steps:
        return None
    tail = load[-max(1, len(steps) // 10) :].mean(axis=0) * load.shape[2]
    return int((tail < _IDLE).sum()), int(tail.size)


def by_layer(run: RunData, key: str, factor: float = 1.0) -> list[Series]:
    """`layers.<key>` as one line per layer, coloured by depth."""
    steps, values = layer_array(run, key)
    if not steps:
        return []
    chosen = chosen_layers(values.shape[1])
    series = []
    for layer in chosen:
        line = [None if math.isnan(value) else factor * value for value in values[:, layer].tolist()]
        color = depth_color(layer, values.shape[1])
        points = thin(steps, line, POINTS)
        series.append(Series(f"layer {layer + 1}", *points, color, markers=len(steps) <= MARKED // 2))
    return series


def drops(run: RunData) -> Figure | None:
    """Dropped share over steps, per layer where recorded."""
    series = by_layer(run, "dropped", 100.0)
    if not series and run.has("dropped_fraction"):
        series = raw_and_smooth(run, "dropped_fraction", "all layers", 100.0)
    if not series:
        return None
    axis = Axis("% of assignments", low=0.0)
    svg = line_chart(series, step_axis(run), axis, "Dropped assignments over steps")
    return Figure("Dropped assignments", "Routed to an expert that was full. The token skips that expert.", svg)


def drops_by_position(run: RunData) -> Figure | None:
    """Dropped share by position in the routing group, over the last quarter of the records."""
    steps, values = layer_array(run, "dropped_by_position")
    if not steps:
        return None
    count = max(1, len(steps) // 4)
    tail = 100 * np.nan_to_num(values[-count:]).mean(axis=0)
    x = Axis("position in the routing group (share of its length)", low=0.0, high=1.0)
    svg = bar_chart(tail.tolist(), x, Axis("% of assignments"), "Dropped assignments by position in the group")
    since = f"Mean over steps {steps[-count]:,} to {steps[-1]:,}. " if count > 1 else f"At step {steps[-1]:,}. "
    caption = since + "A rise to the right means that early tokens take the places."
    return Figure("Drops by position", caption, svg)


def entropy(run: RunData) -> Figure | None:
    """Entropy of the router's distribution, with that of an even one."""
    series = by_layer(run, "entropy")
    if not series and run.has("router_entropy"):
        series = raw_and_smooth(run, "router_entropy", "all layers")
    if not series:
        return None
    _, load = layer_array(run, "load")
    experts = load.shape[2] if load.ndim == 3 else None
    references = (
        [] if experts is None else [Reference(f"even: ln {experts} = {math.log(experts):.2f}", math.log(experts))]
    )
    axis = Axis("nats", low=0.0)
    svg = line_chart(series, step_axis(run), axis, "Router entropy over steps", references)
    return Figure("Router entropy", "Mean over tokens; 0 is a router that is always sure.", svg)


def gates(run: RunData) -> Figure | None:
    """Histograms of the gate values at the first, the middle and the last record."""
    steps, counts = layer_array(run, "gate_histogram")
    if not steps:
        return None
    records = sorted({0, len(steps) // 2, len(steps) - 1})
    layers = chosen_layers(counts.shape[1])
    cells: list[list[Histogram]] = [
        [histogram(np.nan_to_num(counts[record, layer]).tolist()) for record in records] for layer in layers
    ]
    columns = [f"step {steps[record]:,}" for record in records]
    x = Axis("gate value", low=0.0, high=1.0)
    svg = histogram_grid(cells, [f"layer {i + 1}" for i in layers], columns, x, "Gate values by layer and step")
    return Figure("Gate values", "How much the chosen experts count in a token's output: 1 is alone and in full.", svg)


def balance(run: RunData) -> list[Figure]:
    """Maximal violation, load-balance loss and router z, as far as the rows have them."""
    cards: Sequence[tuple[str, str, str, Axis, list[Reference]]] = (
        (
            "max_violation",
            "Maximal violation",
            "By how much the busiest expert exceeds the mean load, mean over layers; 0 is perfect balance.",
            Axis("(max - mean) / mean", low=0.0),
            [],
        ),
        (
            "load_balance",
            "Load-balance loss",
            "Before its weight; 1 is perfect balance.",
            Axis("loss, unweighted"),
            [Reference("perfect balance", 1.0)],
        ),
        (
            "router_z",
            "Router z",
            "Mean squared log-sum-exp of the router's logits; growth means ever larger logits.",
            Axis("squared nats"),
            [],
        ),
    )
    figures = []
    for key, heading, caption, axis, references in cards:
        if run.has(key):
            series = raw_and_smooth(run, key, heading.lower())
            if any(number(s.y[-1]) is not None for s in series if s.y):
                figures.append(Figure(heading, caption, line_chart(series, step_axis(run), axis, heading, references)))
    return figures
