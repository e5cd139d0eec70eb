"""What a finished run is measured by, all of it read from its config.json and metrics.jsonl."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sparse_lm.telemetry.routing import idle_experts
from sparse_lm.telemetry.rundata import RunData, get, load_run, number, verdict

SPIKE = 10.0  # a gradient norm over so many times the run's median is a spike


@dataclasses.dataclass(frozen=True)
class Measure:
    """label: for tables and axes. unit: of its numbers. digits: after the point."""

    label: str
    unit: str
    digits: int = 3


MEASURES: Mapping[str, Measure] = {
    "validation_loss": Measure("validation loss", "nats / token", 4),
    "loss_at_equal_time": Measure("validation loss at equal time", "nats / token", 4),
    "nats_per_byte": Measure("validation loss", "nats / byte", 4),
    "entropy_gap": Measure("above the best possible loss", "nats / token", 4),
    "train_loss": Measure("training loss", "nats / token", 4),
    "steps_per_second": Measure("speed", "steps / s", 1),
    "max_violation": Measure("MaxVio", "busiest / mean load - 1", 2),
    "dropped": Measure("dropped in training", "share of assignments"),
    "dropped_eval": Measure("dropped in evaluation", "share of assignments"),
    "dead_experts": Measure("dead experts", "under a tenth of an even load", 1),
    "gradient_spikes": Measure("gradient spikes", f"share of rows over {SPIKE:g} medians", 4),
    "router_z": Measure("router z", "mean squared logsumexp"),
    "seconds": Measure("training time", "s", 1),
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """Validation loss over a run: at which step, and after how many seconds of training."""

    steps: tuple[int, ...]
    seconds: tuple[float, ...]
    losses: tuple[float, ...]

    def at(self, seconds: float) -> float | None:
        """The loss at a time, between evaluations on a line; None before the first and after the last."""
        if not self.seconds or not self.seconds[0] <= seconds <= self.seconds[-1] * (1 + 1e-9):
            return None
        return float(np.interp(seconds, self.seconds, self.losses))


@dataclasses.dataclass(frozen=True)
class Measured:
    """A run in numbers. values: by name of `MEASURES`, those that there are. parameters, active, flops: as recorded."""

    values: Mapping[str, float]
    curve: Curve
    parameters: float | None
    active: float | None
    flops_per_token: float | None
    device: str

    def evaluated_only(self) -> Measured:
        """Without what a training took, which another variant's row says; its loss while it trained is that one's."""
        values = {name: value for name, value in self.values.items() if name not in ("seconds", "steps_per_second")}
        return dataclasses.replace(self, values=values)


def measure_run(run_dir: Path) -> Measured:
    """Reads a run. Raises `FileNotFoundError` and `ValueError` as `load_run` does."""
    run = load_run(run_dir)
    end = verdict(run)
    last = run.validation[-1] if run.validation else {}
    tokens = _tokens_per_step(run)
    idle = idle_experts(run)
    rate = end.tokens_per_second
    found = {
        "validation_loss": end.validation_loss,
        "nats_per_byte": None if end.bits_per_byte is None else end.bits_per_byte * math.log(2),
        "entropy_gap": end.entropy_gap,
        "train_loss": end.train_loss,
        "steps_per_second": None if rate is None or not tokens else rate / tokens,
        "max_violation": end.max_violation,
        "dropped": end.dropped if idle is not None else None,
        "dropped_eval": number(last.get("dropped_fraction")),
        "dead_experts": None if idle is None else float(idle[0]),
        "gradient_spikes": _spikes(run),
        "router_z": _tail_mean(run, "router_z"),
        "seconds": end.seconds,
    }
    values = {name: float(value) for name, value in found.items() if value is not None and math.isfinite(value)}
    total, active, flops = (number(get(run.info, "parameters", key)) for key in ("total", "active", "flops_per_token"))
    device = str(get(run.info, "device", "kind") or get(run.info, "device", "platform") or "unknown")
    return Measured(values, _curve(run), total, active, flops, device)


def _tokens_per_step(run: RunData) -> float | None:
    batch, length = (number(get(run.info, "config", *path)) for path in (("train", "batch_size"), ("data", "length")))
    return None if batch is None or length is None else batch * length


def _tail_mean(run: RunData, key: str) -> float | None:
    values = [value for value in run.column(key)[1][-10:] if value is not None]
    return statistics.fmean(values) if values else None


def _spikes(run: RunData) -> float | None:
    norms = [value for value in run.column("gradient_norm")[1] if value is not None]
    if not norms:
        return None
    limit = SPIKE * statistics.median(norms)
    return sum(norm > limit for norm in norms) / len(norms)


def _curve(run: RunData) -> Curve:
    seconds = {row["step"]: number(row.get("seconds")) for row in run.train}
    points = []
    for row in run.validation:
        loss, when = number(row.get("loss")), seconds.get(row["step"])
        if loss is not None and when is not None:
            points.append((row["step"], when, loss))
    steps, times, losses = zip(*points, strict=True) if points else ((), (), ())
    return Curve(steps, times, losses)


def equal_time(curves: Mapping[str, Curve]) -> dict[str, float]:
    """Each variant's loss at the training time of the one that was done first. curves: of one seed.

    Empty when a curve is; a variant whose first evaluation came later than that time is left out.
    """
    if not curves or not all(curve.seconds for curve in curves.values()):
        return {}
    common = min(curve.seconds[-1] for curve in curves.values())
    losses = {name: curve.at(common) for name, curve in curves.items()}
    return {name: loss for name, loss in losses.items() if loss is not None}
