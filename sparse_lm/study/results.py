"""What a study has found so far: read from the directories of its runs, written as results.json and table.md."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lm.study import stats
from sparse_lm.study.claims import Compared, Judged, judge
from sparse_lm.study.measures import MEASURES, Measured, equal_time, measure_run
from sparse_lm.study.plan import Plan
from sparse_lm.study.record import Record, record
from sparse_lm.study.runner import State, failure_of, run_dir, state_of
from sparse_lm.study.study import BASELINE
from sparse_lm.telemetry.format import markdown_table
from sparse_lm.telemetry.sinks import plain, replace_file

RESULTS_NAME, TABLE_NAME = "results.json", "table.md"
COLUMNS = ("max_violation", "dropped", "dead_experts", "steps_per_second")  # beside the loss, in tables


@dataclasses.dataclass(frozen=True)
class Results:
    """plan, and of its runs: states and failures by name, the finished ones measured, variant -> seed -> `Measured`.

    values: measure -> variant -> seed -> number. judged: the claims. record: when and on what the finished ones ran.
    command: what reproduces it.
    """

    plan: Plan
    states: Mapping[str, State]
    failures: Mapping[str, str]
    measured: Mapping[str, Mapping[int, Measured]]
    values: Mapping[str, Mapping[str, Mapping[int, float]]]
    judged: tuple[Judged, ...]
    record: Record | None
    command: str

    @property
    def complete(self) -> bool:
        """Whether no run is left to do."""
        return all(state in ("finished", "failed") for state in self.states.values())

    @property
    def seconds(self) -> float:
        """Seconds of training in all finished runs."""
        return sum(sum(seeds.values()) for seeds in self.values.get("seconds", {}).values())

    def summary(self, measure: str, variant: str) -> stats.Summary | None:
        """Mean, standard error and n over the finished seeds; None without any."""
        found = list(self.values.get(measure, {}).get(variant, {}).values())
        return stats.summary(found) if found else None

    def detectable(self) -> float | None:
        """The smallest difference to the baseline that the seeds could show, in the study's measure: the median."""
        reference = self.values.get(self.plan.study.measure, {})
        first = reference.get(BASELINE, {})
        found = []
        for name in self.plan.study.variants:
            both = sorted(first.keys() & reference.get(name, {}).keys())
            if len(both) > 1:
                found.append(stats.smallest_detectable([reference[name][seed] - first[seed] for seed in both]))
        return statistics.median(found) if found else None


def gather(plan: Plan, directory: Path, command: str = "") -> Results:
    """Reads everything that is there. A finished run without readable metrics raises `ValueError` with its path."""
    states: dict[str, State] = {run.name: state_of(directory, run) for run in plan.runs}
    measured: dict[str, dict[int, Measured]] = {name: {} for name in plan.variants}
    for run in plan.runs:
        if states[run.name] == "finished":
            found = measure_run(run_dir(directory, run))
            measured[run.variant][run.seed] = found if run.training is None else found.evaluated_only()
    values: dict[str, dict[str, dict[int, float]]] = {}
    for variant, seeds in measured.items():
        for seed, one in seeds.items():
            for measure, value in one.values.items():
                values.setdefault(measure, {}).setdefault(variant, {})[seed] = value
    if plan.study.budget == "time":
        for seed in {run.seed for run in plan.runs}:
            curves = {variant: seeds[seed].curve for variant, seeds in measured.items() if seed in seeds}
            if len(curves) == len(measured):
                for variant, loss in equal_time(curves).items():
                    values.setdefault("loss_at_equal_time", {}).setdefault(variant, {})[seed] = loss
    judged = tuple(judge(claim, values, plan.study.measure) for claim in plan.study.claims)
    failures = {run.name: failure_of(directory, run) for run in plan.runs if states[run.name] == "failed"}
    recorded = record(run_dir(directory, run) for run in plan.runs if states[run.name] == "finished")
    return Results(plan, states, failures, measured, values, judged, recorded, command)


def to_json(results: Results) -> dict[str, Any]:
    """Everything as plain data; infinite ends of ranges and what is missing are null."""
    plan, study = results.plan, results.plan.study
    counts = {
        state: list(results.states.values()).count(state) for state in ("finished", "failed", "started", "waiting")
    }
    devices = sorted({one.device for seeds in results.measured.values() for one in seeds.values()})
    return plain(
        {
            "study": study.name,
            "question": study.question,
            "source": dataclasses.asdict(study.source),
            "scale": plan.scale,
            "budget": study.budget,
            "command": results.command,
            "complete": results.complete,
            "runs": counts,
            "failures": dict(results.failures),
            "devices": devices,
            "training_seconds": results.seconds,
            "record": results.record and dataclasses.asdict(results.record),
            "measure": study.measure,
            "unit": MEASURES[study.measure].unit,
            "paper_unit": study.unit,
            "flop_tolerance": study.flop_tolerance,
            "power": {
                "smallest_detectable": results.detectable(),
                "confidence": stats.CONFIDENCE,
                "power": stats.POWER,
                "meaning": "true mean difference to the baseline that a paired t test finds so often; median over "
                "variants",
            },
            "variants": {name: _variant_json(results, name) for name in plan.variants},
            "claims": [_claim_json(one) for one in results.judged],
        }
    )


def paper_number(results: Results, variant: str) -> float | None:
    """The paper's number for a variant, in the study's unit."""
    study = results.plan.study
    return study.baseline_paper if variant == BASELINE else study.variants[variant].paper


def _variant_json(results: Results, name: str) -> dict[str, Any]:
    study, cost = results.plan.study, results.plan.costs[name]
    main = results.summary(study.measure, name)
    recorded = next(iter(results.measured[name].values()), None)
    changes = {} if name == BASELINE else study.variants[name].changes
    return {
        "mean": main and main.mean,
        "standard_error": main and main.standard_error,
        "n": main.n if main else 0,
        "paper": paper_number(results, name),
        "changes": {key: _shown(value) for key, value in changes.items()},
        "evaluates": None if name == BASELINE else study.variants[name].evaluates,
        **dataclasses.asdict(cost),
        "recorded": None
        if recorded is None
        else {
            "parameters": recorded.parameters,
            "active": recorded.active,
            "flops_per_token": recorded.flops_per_token,
        },
        "measures": {
            measure: dataclasses.asdict(found) | {"values": results.values[measure][name]}
            for measure in MEASURES
            if (found := results.summary(measure, name)) is not None
        },
    }


def _shown(value: Any) -> Any:
    if callable(value):
        return getattr(value, "__name__", repr(value))
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


def _claim_json(judged: Judged) -> dict[str, Any]:
    return {
        "name": judged.claim.name,
        "statement": judged.claim.statement,
        "measure": judged.measure,
        "verdict": judged.verdict,
        "comparisons": [_compared_json(one) for one in judged.compared],
    }


def _compared_json(one: Compared) -> dict[str, Any]:
    found = stats.summary(one.differences) if one.differences else None
    return {
        "holds_if": one.comparison.words(),
        "verdict": one.verdict,
        "mean": found and found.mean,
        "standard_error": found and found.standard_error,
        "n": len(one.differences),
        "differences": one.differences,
        "bootstrap_interval": one.interval and [one.interval.low, one.interval.high],
        "t_interval": one.t_interval and [one.t_interval.low, one.t_interval.high],
        "smallest_detectable": one.smallest_detectable,
        "luck": one.luck,
    }


def plus_minus(found: stats.Summary | None, digits: int) -> str:
    """`1.234 ± 0.005`; without an error when there is one value, a dash when there is none."""
    if found is None:
        return "-"
    error = "" if found.standard_error is None else f" ± {found.standard_error:.{digits}f}"
    return f"{found.mean:.{digits}f}{error}"


def variant_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of variants, as text."""
    study = results.plan.study
    columns = [name for name in COLUMNS if results.values.get(name)]
    main = MEASURES[study.measure]
    head = ["variant", f"{main.label} ({main.unit})", "n", f"paper ({study.unit})" if study.unit else "paper"]
    head += ["parameters", "FLOPs / baseline", *(f"{MEASURES[name].label} ({MEASURES[name].unit})" for name in columns)]
    rows = []
    for name in results.plan.variants:
        cost, found, paper = results.plan.costs[name], results.summary(study.measure, name), paper_number(results, name)
        row = [
            name,
            plus_minus(found, main.digits),
            str(found.n if found else 0),
            "-" if paper is None else f"{paper:g}",
        ]
        row += [f"{cost.parameters:,}", f"{cost.flop_ratio:.3f}{'' if cost.matched else ' (not matched)'}"]
        row += [plus_minus(results.summary(column, name), MEASURES[column].digits) for column in columns]
        rows.append(row)
    return head, rows


def claim_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of claims: one row for each comparison, the verdict of the claim in the first."""
    head = ["claim", "the paper says", "verdict", "holds if", "found", "interval", "could have seen", "luck"]
    rows = []
    for judged in results.judged:
        digits = MEASURES[judged.measure].digits
        for i, one in enumerate(judged.compared):
            first = [judged.claim.name, judged.claim.statement, judged.verdict] if i == 0 else ["", "", ""]
            found = stats.summary(one.differences) if one.differences else None
            interval = one.interval and f"{one.interval.low:.{digits}f} to {one.interval.high:.{digits}f}"
            seen = "-" if one.smallest_detectable is None else f"{one.smallest_detectable:.{digits}f}"
            about = "" if judged.measure == results.plan.study.measure else f"{MEASURES[judged.measure].label}: "
            chance = f"{100 * one.luck:.3g} %"
            rows.append(
                [*first, about + one.comparison.words(), plus_minus(found, digits), interval or "-", seen, chance]
            )
    return head, rows


def power_sentence(results: Results) -> str:
    """What these seeds could have shown, in words."""
    smallest, main = results.detectable(), MEASURES[results.plan.study.measure]
    if smallest is None:
        return "Power: not known before two seeds of two variants have finished."
    return (
        f"Power: with these seeds a difference to the baseline of {smallest:.{main.digits}f} {main.unit} would be "
        f"found in {stats.POWER:.0%} of repetitions (paired t test at {stats.CONFIDENCE:.0%}; median over variants). "
        "A claim that is not shown may still be true by less than that."
    )


def to_markdown(results: Results) -> str:
    """The table of variants, the claims with their verdicts, and the power, as Markdown."""
    study = results.plan.study
    counts = f"{sum(state == 'finished' for state in results.states.values())} of {len(results.states)} runs finished"
    parts = [
        f"# {study.name} ({results.plan.scale})",
        study.question,
        f"Source: {study.source.paper}, arXiv {study.source.arxiv}, {study.source.table}. {counts}"
        + (f", {len(results.failures)} failed." if results.failures else "."),
        markdown_table(*variant_rows(results)),
        "## Claims",
        markdown_table(*claim_rows(results)),
        power_sentence(results),
    ]
    parts += (
        ["## Failed runs", "\n".join(f"- {n}: {why}" for n, why in results.failures.items())]
        if results.failures
        else []
    )
    parts += [study.notes] if study.notes else []
    parts += [f"    {results.command}"] if results.command else []
    return "\n\n".join(parts) + "\n"


def write_results(results: Results, directory: Path) -> None:
    """Writes results.json and table.md; a reader meets the old ones or the new ones."""
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / RESULTS_NAME, (json.dumps(to_json(results), indent=2) + "\n").encode())
    replace_file(directory / TABLE_NAME, to_markdown(results).encode())
