"""A run directory as the report reads it: configuration, rows by split, series of a key, and the run's bottom line."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sparse_lm.telemetry.sinks import METRICS_NAME, read_rows

CONFIG_NAME = "config.json"
_TAIL = 50  # final numbers of the training split are means over the last 1/50 of its rows


@dataclasses.dataclass(frozen=True)
class RunData:
    """What a run directory holds. Rows are sorted by step; of several rows for one step the newest counts.

    info: config.json as it is. train, validation: rows by split. layers: the training rows that have `layers`.
    """

    name: str
    info: Mapping[str, Any]
    train: tuple[Mapping[str, Any], ...]
    validation: tuple[Mapping[str, Any], ...]
    layers: tuple[Mapping[str, Any], ...]

    @property
    def total_steps(self) -> int | None:
        """How many steps the run was asked for, if its configuration says so."""
        steps = get(self.info, "config", "train", "steps")
        return steps if isinstance(steps, int) else None

    @property
    def last_step(self) -> int:
        """The newest step that has a row; 0 without rows."""
        return max((row["step"] for row in (*self.train, *self.validation)), default=0)

    def column(self, key: str, split: str = "train") -> tuple[list[int], list[float | None]]:
        """Steps and values of the rows that have `key` (a value may be None, where it was not finite)."""
        rows = [row for row in (self.train if split == "train" else self.validation) if key in row]
        return [row["step"] for row in rows], [number(row[key]) for row in rows]

    def has(self, key: str, split: str = "train") -> bool:
        """Whether any row of the split has a number under `key`."""
        return any(value is not None for value in self.column(key, split)[1])


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The bottom line. None where it is not known (yet).

    train_loss (nats/token), tokens_per_second and mfu: means over the last 1/50 of the training rows (`averaged` of
    them). validation_loss, bits_per_byte and entropy_gap: from the last validation row, at `validation_step`.
    best_loss: the lowest possible validation loss. dropped (share), max_violation: means like train_loss.
    """

    averaged: int
    train_loss: float | None
    validation_step: int | None
    validation_loss: float | None
    bits_per_byte: float | None
    entropy_gap: float | None
    best_loss: float | None
    tokens_per_second: float | None
    mfu: float | None
    dropped: float | None
    max_violation: float | None
    nonfinite_steps: int
    seconds: float | None


def get(tree: Any, *path: str) -> Any:
    """The value under a path of keys in nested mappings, or None where the path ends early."""
    for key in path:
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def number(value: Any) -> float | None:
    """`value` if it is a number, else None."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def load_run(run_dir: Path) -> RunData:
    """Reads config.json and metrics.jsonl; a run that has not logged yet has no rows.

    Raises `FileNotFoundError` when there is no config.json, `ValueError` when it is not a JSON object, when a line of
    metrics.jsonl other than the last is invalid, or when a row has no step.
    """
    path = run_dir / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a report needs the directory of a run, which holds one")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); copy it again or start the run afresh") from error
    if not isinstance(info, dict):
        raise ValueError(f"{path}: expected an object, got {type(info).__name__}")
    metrics = run_dir / METRICS_NAME
    by_step: dict[tuple[str, int], dict[str, Any]] = {}
    for i, row in enumerate(read_rows(metrics) if metrics.is_file() else []):
        if not isinstance(row.get("step"), int):
            raise ValueError(f"{metrics}: row {i + 1} has step={row.get('step')!r}; every row needs a whole number")
        by_step[row.get("split", "train"), row["step"]] = row
    rows = sorted(by_step.values(), key=lambda row: row["step"])
    train = tuple(row for row in rows if row.get("split", "train") == "train")
    return RunData(
        name=run_dir.resolve().name,
        info=info,
        train=train,
        validation=tuple(row for row in rows if row.get("split") == "validation"),
        layers=tuple(row for row in train if any(get(row, "layers", key) for key in ("load", "attention_load"))),
    )


def verdict(run: RunData) -> Verdict:
    """The run's bottom line; see `Verdict`."""
    averaged = max(1, len(run.train) // _TAIL)
    last = run.validation[-1] if run.validation else {}
    loss, gap = number(last.get("loss")), number(last.get("entropy_gap"))
    counts = [value for value in run.column("nonfinite_steps")[1] if value is not None]

    def tail(key: str) -> float | None:
        values = [value for row in run.train[-averaged:] if (value := number(row.get(key))) is not None]
        return statistics.fmean(values) if values else None

    return Verdict(
        averaged=min(averaged, len(run.train)),
        train_loss=tail("loss"),
        validation_step=last.get("step"),
        validation_loss=loss,
        bits_per_byte=number(last.get("bits_per_byte")),
        entropy_gap=gap,
        best_loss=loss - gap if loss is not None and gap is not None else None,
        tokens_per_second=tail("tokens_per_second"),
        mfu=tail("mfu"),
        dropped=tail("dropped_fraction"),
        max_violation=tail("max_violation"),
        nonfinite_steps=int(max(counts, default=0)),
        seconds=number(run.train[-1].get("seconds")) if run.train else None,
    )


def smooth(values: Sequence[float | None], half_width: int) -> list[float | None]:
    """Centred running means over up to `half_width` values on either side, None left out of them and kept as None.

    Near the start the window shrinks on both sides alike, so that a loss that falls steeply there is not bent. At the
    end only the side that is missing goes: the last means are calm, and lag a little.
    """
    numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
    there = np.isfinite(numbers)
    sums = np.concatenate([[0.0], np.cumsum(np.where(there, numbers, 0.0))])
    counts = np.concatenate([[0], np.cumsum(there)])
    index = np.arange(len(numbers))
    half = np.minimum(half_width, index)
    left, right = index - half, index + np.minimum(half, len(numbers) - 1 - index) + 1
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (sums[right] - sums[left]) / (counts[right] - counts[left])
    return [float(mean) if ok else None for mean, ok in zip(means, there, strict=True)]


def thin(steps: Sequence[int], values: Sequence[float | None], limit: int) -> tuple[list[int], list[float | None]]:
    """At most about `limit` points: the lowest and the highest of each stretch and both ends, so that spikes survive.

    A stretch without any number keeps one None, so that its gap survives too.
    """
    count = len(steps)
    if count <= limit:
        return list(steps), list(values)
    kept = {0, count - 1}
    stretches = max(1, limit // 2)
    for i in range(stretches):
        part = range(i * count // stretches, (i + 1) * count // stretches)
        there = [j for j in part if values[j] is not None]
        if there:
            kept |= {min(there, key=lambda j: values[j]), max(there, key=lambda j: values[j])}  # type: ignore
        else:
            kept.add(part[0])
    order = sorted(kept)
    return [steps[j] for j in order], [values[j] for j in order]


def resample(steps: Sequence[int], rows: np.ndarray, columns: int) -> np.ndarray:
    """Samples at uneven steps as `columns` even columns: the mean of a column's samples, else the one before.

    rows: [samples, ...] at increasing `steps`; returns [columns, ...]. Raises `ValueError` without samples.
    """
    if len(steps) == 0 or len(steps) != len(rows):
        raise ValueError(f"resampling {len(rows)} samples at {len(steps)} steps: need as many, and at least one")
    span = max(1, steps[-1] - steps[0])
    place = np.minimum((np.asarray(steps) - steps[0]) * columns // span, columns - 1)
    out = np.empty((columns, *rows.shape[1:]))
    for column in range(columns):
        inside = rows[place == column]
        out[column] = inside.mean(axis=0) if len(inside) else out[column - 1]
    return out
