"""Plans of many variants as one table: experts x top-k x mesh x topology, as CSV, Markdown and a plot."""

from __future__ import annotations

import ast
import csv
import dataclasses
import io
import itertools
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_lm.config import ConfigError
from sparse_lm.experiment import Experiment
from sparse_lm.planning.plan import CompiledStep, OutOfMemory, Plan
from sparse_lm.telemetry.axes import Axis
from sparse_lm.telemetry.colors import SERIES
from sparse_lm.telemetry.format import markdown_table
from sparse_lm.telemetry.svg import Reference, Series, Size, line_chart

TOPOLOGY = "topology"
Setting = dict[str, Any]  # dotted key of the configuration, or `topology` -> a value
Axes = tuple[tuple[Setting, ...], ...]  # per axis, what changes from one of its places to the next
_DASHES = (None, "6 3", "2 3", "8 2 2 2")
COLUMNS = (
    "GB_per_device",
    "fits",
    "source",
    "executed_over_model_flops",
    "bound",
    "step_ms_at_least",
    "step_ms_one_by_one",
    "communication_ms",
    "mfu_at_most",
    "compile_s",
    "refused",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """One variant. setting: the swept keys with its values. plan: None where the configuration was refused, and why."""

    setting: Mapping[str, Any]
    plan: Plan | None
    refused: str = ""

    def cells(self) -> tuple[str, ...]:
        """What stands in the `COLUMNS`."""
        if self.plan is None:
            return ("",) * (len(COLUMNS) - 1) + (self.refused,)
        plan, found = self.plan, self.plan.roofline
        stuck = isinstance(plan.compiled, OutOfMemory)
        seconds = plan.compiled.seconds if isinstance(plan.compiled, CompiledStep | OutOfMemory) else None
        speed = ("",) * 6
        if found is not None and not stuck:
            times = tuple(f"{1e3 * s:.1f}" for s in (found.overlapped, found.serial, found.communication))
            speed = (f"{plan.overhead:.3f}", found.bound, *times, f"{found.utilisation[1]:.3f}")
        fits = "" if plan.fits is None else "yes" if plan.fits else "no"
        compiled = "" if seconds is None else f"{seconds:.1f}"
        return (f"{plan.peak / 1e9:.2f}", fits, plan.source, *speed, compiled, "")


def parse_sweep(text: str) -> Axes:
    """`num_experts=8,64 top_k=1,2 mesh.expert=4,8 topology=v5e:4x4,v5p:2x2x4` as axes of a table.

    A key without a dot is one of `model.moe`. Keys with a + between change together, and so do their values:
    `topology+train.batch_size=v5e:4x4+64,v5e:8x8+256`. Raises `ConfigError` for what is not `key=value,value`, and for
    as many values as there are not keys.
    """
    axes = []
    for part in shlex.split(text):
        key, equals, values = part.partition("=")
        if not equals or not key or not values:
            raise ConfigError("sweep", part, "an axis is key=value,value, as in num_experts=8,64 or mesh.expert=4,8")
        names = [name if "." in name or name == TOPOLOGY else f"model.moe.{name}" for name in key.split("+")]
        axes.append(tuple(_setting(names, value, part) for value in values.split(",")))
    if not axes:
        raise ConfigError("sweep", text, "names no axis; use for example num_experts=8,64 top_k=1,2")
    return tuple(axes)


def _setting(names: Sequence[str], text: str, axis: str) -> Setting:
    values = text.split("+") if len(names) > 1 else [text]
    if len(values) != len(names):
        raise ConfigError(
            "sweep", axis, f"{text} is {len(values)} of {len(names)} values; put a + between them, as between the keys"
        )
    pairs = zip(names, values, strict=True)
    return {name: value if name == TOPOLOGY else _value(value) for name, value in pairs}


def sweep(
    experiment: Experiment,
    axes: Axes,
    planner: Callable[[Experiment, str | None], Plan],
    watch: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """A row for every combination of the axes, the last one fastest.

    planner: (experiment, topology or None) -> plan. watch: sees every row when it is ready. A combination that the
    configuration refuses is a row that says why.
    """
    rows = []
    for places in itertools.product(*axes):
        setting = {key: value for place in places for key, value in place.items()}
        changes = {key.replace(".", "__"): value for key, value in setting.items() if key != TOPOLOGY}
        try:
            row = Row(setting, planner(_changed(experiment, changes), setting.get(TOPOLOGY)))
        except ConfigError as error:
            row = Row(setting, None, str(error))
        rows.append(row)
        watch(row)
    return rows


def write(rows: Sequence[Row], folder: Path) -> None:
    """Writes plan.csv, plan.md and plan.svg into a folder, which is made. Raises `ConfigError` when it cannot be."""
    texts = {"csv": to_csv(rows), "md": to_markdown(rows), "svg": to_svg(rows)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            (folder / f"plan.{suffix}").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("out", str(folder), f"cannot be written ({error}); choose another folder") from error


def to_csv(rows: Sequence[Row]) -> str:
    """The table as CSV: a column for every swept key, then `COLUMNS`."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*_keys(rows), *COLUMNS])
    writer.writerows([*map(str, row.setting.values()), *row.cells()] for row in rows)
    return out.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown."""
    head = [*(key.rpartition(".")[2] if key.startswith("model.") else key for key in _keys(rows)), *COLUMNS]
    body = [[*map(str, row.setting.values()), *row.cells()] for row in rows]
    return markdown_table(head, [[cell.replace("|", "/") for cell in line] for line in body]) + "\n"


def to_svg(rows: Sequence[Row]) -> str:
    """Bytes per device over the first swept key that has numbers, a line for every combination of the others.

    Dashed lines are the main memories of the chips. Raises `ConfigError` when no swept key has numbers.
    """
    numeric = [key for key in _keys(rows) if all(isinstance(row.setting[key], int | float) for row in rows)]
    if not numeric:
        raise ConfigError("sweep", ", ".join(_keys(rows)), "no axis has numbers to plot over; add one, as num_experts=")
    axis = numeric[0]
    lines: dict[str, list[Row]] = {}
    for row in rows:
        if row.plan is not None:
            others = ((key.rpartition(".")[2], value) for key, value in row.setting.items() if key != axis)
            lines.setdefault(", ".join(f"{key} {value}" for key, value in others) or "bytes", []).append(row)
    series = [
        Series(
            name,
            [row.setting[axis] for row in line],
            [row.plan.peak / 1e9 if row.plan else None for row in line],
            SERIES[i % len(SERIES)],
            markers=True,
            dash=_DASHES[(i + i // len(SERIES)) % len(_DASHES)],
        )
        for i, (name, line) in enumerate(lines.items())
    ]
    chips = {row.plan.chip.name: row.plan.chip for row in rows if row.plan is not None and row.plan.chip is not None}
    limits = [Reference(f"memory of {name}", chip.hbm / 1e9) for name, chip in chips.items()]
    title = f"Bytes per device over {axis}"
    height = 260 + 16 * (len(series) + len(limits)) // 2
    x = Axis(axis, log=all(row.setting[axis] > 0 for row in rows))
    return line_chart(series, x, Axis("GB per device", log=True), title, limits, Size(640, height))


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(rows[0].setting) if rows else []


def _changed(experiment: Experiment, changes: dict[str, Any]) -> Experiment:
    try:
        return experiment.replace(**changes)
    except (AttributeError, TypeError) as error:
        keys = ", ".join(key.replace("__", ".") for key in changes)
        raise ConfigError("sweep", keys, f"names no option of this experiment ({error})") from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
