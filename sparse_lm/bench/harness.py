"""How two things are timed against each other, and what a benchmark reports.

Times of a shared machine drift by more than what is to be measured. So both sides of a comparison run in turn, A B A B,
and the ratio is taken within each pair; how far the pairs differ is reported beside their median.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax

from sparse_lm.experiment import Experiment
from sparse_lm.telemetry.format import compact, percent
from sparse_lm.telemetry.machine import cpu_cores, cpu_model
from sparse_lm.telemetry.peak import published_peak


@dataclasses.dataclass(frozen=True)
class Paired:
    """ratio: the median of a's seconds over b's within each pair; low, high: the smallest and the largest of them.

    seconds_a, seconds_b: medians of each side, whose own ratio may differ from `ratio`.
    """

    ratio: float
    low: float
    high: float
    seconds_a: float
    seconds_b: float
    repeats: int


@dataclasses.dataclass(frozen=True)
class Options:
    """What the benchmarks may be told. quick: small sizes and few repeats, to see that they run, not to be quoted.

    experiment: what `train_step` and `startup` measure. repeats: pairs, None is each benchmark's own number.
    tokens, dtype, activation: of `moe_layer` and `experts`; tokens None is their own number.
    against: `hf` times `train_step` against the Mixtral of transformers in the environment of `python`, with `batch`
    rows of tokens in a step (None is its own number); None is the dense twin of the experiment.
    """

    experiment: Experiment
    quick: bool = False
    repeats: int | None = None
    tokens: int | None = None
    dtype: str = "float32"
    activation: str = "relu"
    against: str | None = None
    python: str | None = None
    batch: int | None = None


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where the times were taken. load: see `system_load`, before the benchmark began."""

    cpu: str
    cores: int
    load: float | None
    python: str
    jax: str
    platform: str
    device_kind: str
    device_count: int
    published_peak: float | None


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a plot shows of a row. values: one for each name, all in `unit`; the names are alike in all rows.

    x: place on a logarithmic axis, so that rows make lines; None draws bars under the name of the row. line: rows of
    the same one are connected.
    """

    name: str
    values: dict[str, float]
    unit: str
    x: float | None = None
    line: str = ""


class Row(Protocol):
    """One line of a benchmark's table."""

    def cells(self) -> dict[str, str]:
        """The line as text by heading; all rows of a benchmark have the same headings."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Every number of the line."""
        ...

    def drawn(self) -> Drawn:
        """What a plot shows of the line."""
        ...


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`case` timed against `against`: both do useful work of `flops` (and `flops_against`) on `tokens` in each call.

    peak: FLOP/s of large matrix products on all devices that take part: the limit. Measured in the same run, before
    and after, and the larger of the two.
    work: FLOPs that the compiler counts in `case` over those in `against`, the work that is not useful included; at
    equal efficiency the ratio of the times would be this. None where the compiler cannot tell (loops).
    """

    case: str
    against: str
    paired: Paired
    tokens: int
    flops: float
    flops_against: float
    peak: float
    work: float | None = None

    @property
    def share(self) -> float:
        """Useful FLOP/s of `case` as a share of the peak."""
        return self.flops / self.paired.seconds_a / self.peak

    @property
    def share_against(self) -> float:
        """Useful FLOP/s of `against` as a share of the peak."""
        return self.flops_against / self.paired.seconds_b / self.peak

    def cells(self) -> dict[str, str]:
        """See `Row`."""
        pair = self.paired
        return {
            "case": self.case,
            "against": self.against,
            "ms": compact(1e3 * pair.seconds_a),
            "against ms": compact(1e3 * pair.seconds_b),
            "ratio": f"{pair.ratio:.2f} ({pair.low:.2f}..{pair.high:.2f})",
            "work": "-" if self.work is None else f"{self.work:.2f}",
            "tokens/s": compact(self.tokens / pair.seconds_a),
            "against tokens/s": compact(self.tokens / pair.seconds_b),
            "FLOPs": compact(self.flops),
            "peak FLOP/s": compact(self.peak),
            "of peak": percent(self.share),
            "against of peak": percent(self.share_against),
        }

    def drawn(self) -> Drawn:
        """See `Row`."""
        values = {"measured": self.tokens / self.paired.seconds_a, "against": self.tokens / self.paired.seconds_b}
        limit = self.peak * self.tokens / self.flops
        return Drawn(f"{self.case} / {self.against}", {**values, "limit": limit}, "tokens/s")

    def to_json(self) -> dict[str, Any]:
        """See `Row`."""
        values = dataclasses.asdict(self)
        times = values.pop("paired")
        return {
            **values,
            **times,
            "tokens_per_second": self.tokens / self.paired.seconds_a,
            "tokens_per_second_against": self.tokens / self.paired.seconds_b,
            "share_of_peak": self.share,
            "share_of_peak_against": self.share_against,
        }


@dataclasses.dataclass(frozen=True)
class Report:
    """The outcome of one benchmark. date: when it ended, UTC, ISO 8601."""

    name: str
    machine: Machine
    rows: Sequence[Row]
    date: str

    def to_json(self) -> dict[str, Any]:
        """Every number, ready for `json.dump`."""
        rows = [row.to_json() for row in self.rows]
        return {"name": self.name, "machine": dataclasses.asdict(self.machine), "rows": rows, "date": self.date}

    def text(self) -> str:
        """The table to print, with the machine above it."""
        here = self.machine
        published = "" if here.published_peak is None else f", published peak {compact(here.published_peak)} FLOP/s"
        load = "" if here.load is None else f", load {here.load:.1f}"
        devices = f"{here.device_count} x {here.device_kind}{published}"
        head = [f"{self.name}, {self.date}", f"{here.cpu}, {here.cores} cores{load}; {devices}; jax {here.jax}"]
        if here.load is not None and here.load > here.cores:
            head.append("other processes keep the cores busy: seconds and peak are theirs too, and the ratios spread")
        return "\n".join([*head, *_table([row.cells() for row in self.rows])])


def paired(
    a: Callable[[], object],
    b: Callable[[], object],
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Times a against b: `warm_up` calls of each that do not count, then `repeats` times a, b.

    Both have to return only when their work is done (`jax.block_until_ready`). Raises `ValueError` when `repeats` is
    under 1 or `warm_up` negative.
    """
    if repeats < 1 or warm_up < 0:
        raise ValueError(f"repeats={repeats} must be at least 1 and warm_up={warm_up} at least 0")

    def timed(function: Callable[[], object]) -> float:
        start = clock()
        function()
        return clock() - start

    for _ in range(warm_up):
        a()
        b()
    pairs = [(timed(a), timed(b)) for _ in range(repeats)]
    ratios = [first / second for first, second in pairs]
    seconds_a, seconds_b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return Paired(statistics.median(ratios), min(ratios), max(ratios), seconds_a, seconds_b, repeats)


def report(name: str, rows: Sequence[Row], load: float | None) -> Report:
    """The rows with the machine and the time. Starts jax's backend, where that has not happened yet."""
    now = datetime.datetime.now(datetime.UTC)
    return Report(name, machine(load), rows, now.isoformat(timespec="seconds"))


def system_load() -> float | None:
    """Processes that wanted a core, on average over the last minute; None where it is not known."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def machine(load: float | None) -> Machine:
    """The machine of this process."""
    device = jax.devices()[0]
    return Machine(
        cpu=cpu_model(),
        cores=cpu_cores(),
        load=load,
        python=platform.python_version(),
        jax=jax.__version__,
        platform=device.platform,
        device_kind=device.device_kind,
        device_count=jax.device_count(),
        published_peak=published_peak(device.device_kind),
    )


def _table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Lines of aligned columns under the keys of the first row; the first column is text, the others stand right."""
    if not rows:
        return []
    lines = [list(rows[0]), *([row[key] for key in rows[0]] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
