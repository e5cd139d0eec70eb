"""Measured points: columns and losses from a CSV, from the runs of a study, or drawn from a law."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_lm.config import ConfigError, from_dict
from sparse_lm.data.documents import DataError
from sparse_lm.experiment import Experiment
from sparse_lm.models.counts import count
from sparse_lm.scaling.laws import LIMITS, Law
from sparse_lm.telemetry.rundata import CONFIG_NAME, load_run, number

RESULTS_NAME = "results.json"


@dataclasses.dataclass(frozen=True)
class Points:
    """columns: by name of `laws.LIMITS`, of equal length. loss: nats per token. origin: for errors. labels: of rows."""

    columns: Mapping[str, np.ndarray]
    loss: np.ndarray
    origin: str
    labels: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many points."""
        return len(self.loss)

    def take(self, rows: np.ndarray) -> Points:
        """Some of the points, in this order; one may be taken more than once."""
        labels = tuple(self.labels[int(i)] for i in rows) if self.labels else ()
        return Points(
            {name: column[rows] for name, column in self.columns.items()}, self.loss[rows], self.origin, labels
        )


def from_rows(rows: Iterable[Mapping[str, Any]], origin: str, labels: Sequence[str] = ()) -> Points:
    """Points from rows of numbers or their text; columns that are not of `laws.LIMITS` are left out.

    Raises `DataError` naming row (from 1) and key for what is missing, no number, or outside of its limits.
    """
    rows = list(rows)
    if not rows:
        raise DataError(f"{origin}: no rows; a fit needs measured points")
    names = [name for name in LIMITS if name in rows[0]]
    if "loss" not in names:
        raise DataError(f"{origin}: no column 'loss' (nats per token); there are {', '.join(map(str, rows[0]))}")
    table = {name: np.array([_checked(row, i, name, origin) for i, row in enumerate(rows, 1)]) for name in names}
    return Points({k: v for k, v in table.items() if k != "loss"}, table["loss"], origin, tuple(labels))


def _checked(row: Mapping[str, Any], index: int, name: str, origin: str) -> float:
    low, closed, high = LIMITS[name]
    where = f"{origin}, row {index}, {name}={row.get(name)!r}"
    try:
        value = float(row[name])
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{where}: expected a number; fill it in or take the row out") from None
    if not np.isfinite(value) or value < low or (value == low and not closed) or value >= high:
        least = f"at least {low:g}" if closed else f"greater than {low:g}"
        most = f" and less than {high:g}" if np.isfinite(high) else ", finite"
        raise DataError(f"{where}: must be {least}{most}; correct it or take the row out")
    return value


def read(path: Path) -> Points:
    """Points of a CSV, of a study's results.json, or of all finished runs below a directory.

    Raises `DataError` when there is nothing to read, or what is there is no measurement.
    """
    if path.is_dir():
        return read_runs(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give a CSV, a study's {RESULTS_NAME}, or a directory of runs")
    return read_study(path) if path.suffix == ".json" else read_csv(path)


def read_csv(path: Path) -> Points:
    """Points of a CSV with a head of column names, `loss` among them. Raises `DataError`, see `from_rows`."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    return from_rows(rows, str(path))


def read_study(path: Path) -> Points:
    """Points of a study, one for each variant and seed: losses from its results.json, the rest from its runs beside it.

    Raises `DataError` when it is no such file, no run has finished, or the directory of one is gone.
    """
    try:
        variants = json.loads(path.read_text(encoding="utf-8"))["variants"]
        losses = {
            (name, int(seed)): value
            for name, one in variants.items()
            for seed, value in one["measures"].get("validation_loss", {"values": {}})["values"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not the results.json of a study ({error!r}); see docs/studies.md") from error
    rows, labels = [], []
    for (name, seed), loss in losses.items():
        label = f"{name}-s{seed}"
        matching = [
            row
            for run in sorted((path.parent / "runs").glob(f"{label}-*"))
            if (row := run_row(run)) and row["loss"] == loss
        ]
        if not matching:
            raise DataError(
                f"{path}: no finished run {label} with loss {loss} in {path.parent / 'runs'}; run the study again"
            )
        rows.append(matching[0])
        labels.append(label)
    return from_rows(rows, str(path), labels)


def read_runs(folder: Path) -> Points:
    """Points of all finished runs below a directory. Raises `DataError` when there is none."""
    found = {path.parent: run_row(path.parent) for path in sorted(folder.rglob(CONFIG_NAME))}
    rows = {str(run.relative_to(folder)): row for run, row in found.items() if row is not None}
    if not rows:
        raise DataError(f"{folder}: no finished run in or below it ({len(found)} unfinished); train some first")
    return from_rows(rows.values(), str(folder), tuple(rows))


def run_row(run_dir: Path) -> dict[str, float] | None:
    """The columns of a run: sizes from its configuration, the loss of its last evaluation. None when it has not ended.

    Raises `DataError` when its files cannot be read.
    """
    try:
        run = load_run(run_dir)
        experiment: Experiment = from_dict(Experiment, run.info["config"])
        counts = count(experiment.model)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run_dir}: not a run that this version reads ({error}); take it out") from error
    last = run.validation[-1] if run.validation else {}
    loss = number(last.get("loss"))
    if loss is None or last["step"] < experiment.train.steps:
        return None
    return columns_of(experiment) | {
        "total": float(counts.total),
        "active": float(counts.active),
        "total_non_embedding": float(counts.non_embedding),
        "active_non_embedding": float(counts.active_non_embedding),
        "loss": loss,
    }


def columns_of(experiment: Experiment) -> dict[str, float]:
    """Columns other than parameters: tokens and what the experts are, 1 expert of the dense width when dense."""
    model, moe = experiment.model, experiment.model.moe
    tokens = float(experiment.train.steps * experiment.train.batch_size * experiment.data.length)
    if moe is None:
        return {"tokens": tokens, "experts": 1.0, "granularity": 1.0, "sparsity": 0.0}
    share = moe.top_k / moe.num_experts
    return {
        "tokens": tokens,
        "experts": 1 / share,
        "granularity": model.d_ff / model.d_expert,
        "sparsity": 1 - share,
    }


def drawn(law: Law, columns: Mapping[str, np.ndarray], noise: float = 0.0, seed: int = 0) -> Points:
    """Points of a law itself; `noise` is the standard deviation of log loss. Raises `ConfigError` below 0."""
    if noise < 0:
        raise ConfigError("noise", noise, "must be at least 0")
    loss = law.loss(**columns)
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal(loss.shape))
    flat = {name: np.broadcast_to(np.asarray(value, float), loss.shape) for name, value in columns.items()}
    return Points(flat, loss * factors, f"points drawn from {law.kind}")
