"""All studies of a folder on one page: docs/results.md with a plot for each, from what the studies have written.

A study's results.json says what came out, when and on what; its table.md and plots are taken as they are. All three are
kept beside the page, in docs/results/<study>/, so that it can be made anew where only some studies were run. Nothing is
left out: a study that is not finished, or that was never run, is listed as such, and what contradicts a paper comes
first.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_lm.config import ConfigError
from sparse_lm.study.claims import Verdict
from sparse_lm.study.measures import MEASURES
from sparse_lm.study.page import PLOTS_NAME, plot_name
from sparse_lm.study.plan import Plan
from sparse_lm.study.record import Record
from sparse_lm.study.results import RESULTS_NAME, TABLE_NAME, plus_minus
from sparse_lm.study.runner import folder_name, state_of
from sparse_lm.study.stats import Summary
from sparse_lm.study.study import SCALES
from sparse_lm.telemetry.format import duration, markdown_table
from sparse_lm.telemetry.sinks import replace_file

PAGE_NAME, KEPT_NAME = "results.md", "results"
VERDICTS: tuple[Verdict, ...] = ("shown", "not shown", "contradicted")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A study at a scale. name: its folder's. data: its results.json, None where it was never run.

    table: its table.md. folder: where these are, and its plots.
    """

    name: str
    data: Mapping[str, Any] | None = None
    table: str = ""
    folder: Path | None = None

    @property
    def finished(self) -> bool:
        """Whether no run is left to do; failed ones are done."""
        return self.data is not None and bool(self.data["complete"])

    @property
    def record(self) -> Record | None:
        """When and on what its runs ran, where that was recorded."""
        found = self.data and self.data.get("record")
        return Record(**found) if found else None

    @property
    def plot(self) -> str | None:
        """The plot of its measure, relative to its folder, where there is one."""
        if self.folder is None or self.data is None:
            return None
        name = f"{PLOTS_NAME}/{plot_name(MEASURES[self.data['measure']].label)}"
        return name if (self.folder / name).is_file() else None

    def status(self) -> str:
        """How far it is, in words."""
        if self.data is None:
            return "not run"
        runs = self.data["runs"]
        words = f"{runs['finished']} of {sum(runs.values())}"
        words += f", {runs['failed']} failed" if runs["failed"] else ""
        return words if self.finished else f"**not finished**: {words}"


def outstanding(plan: Plan, directory: Path) -> int:
    """How many runs of a plan are still to be done; what has failed is done."""
    return sum(state_of(directory, run) in ("started", "waiting") for run in plan.runs)


def read_entries(workdir: Path, names: Sequence[str], out: Path | None = None) -> list[Entry]:
    """The studies of these names in the toy scale, run or not, and in the others where they were run.

    out: where a page was written before; what it keeps stands in for studies that `workdir` has not finished.

    Raises `ConfigError` when a results.json is not one.
    """
    kept = None if out is None else out / KEPT_NAME
    found = [_entry(name, scale, workdir, kept) for name in names for scale in SCALES]
    return [entry for entry in found if entry.data is not None or entry.name in names]


def _entry(name: str, scale: str, workdir: Path, kept: Path | None) -> Entry:
    """What `workdir` has of a study; what is kept of it, where that is finished and the other is not."""
    place = folder_name(name, scale)
    here = _read(workdir / place)
    before = _read(kept / place) if kept is not None and not here.finished else here
    return before if before.finished else here


def _read(folder: Path) -> Entry:
    path = folder / RESULTS_NAME
    if not path.is_file():
        return Entry(folder.name)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        entry = Entry(folder.name, data, (folder / TABLE_NAME).read_text(encoding="utf-8"), folder)
        _ = entry.status(), entry.plot, _verdicts(entry), entry.record  # what is missing is found here, with the path
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            "workdir", str(path), f"is not the result of a study ({error!r}); run the study's command again"
        ) from error
    return entry


def _verdicts(entry: Entry) -> list[str]:
    """How many claims have each of `VERDICTS`; dashes before the study is finished."""
    found = [claim["verdict"] for claim in entry.data["claims"]] if entry.data else []
    return [str(found.count(one)) if entry.finished else "-" for one in VERDICTS]


def to_markdown(entries: Sequence[Entry]) -> str:
    """The page: a table of all studies, the contradictions, then each study with its own table and plot."""
    head = ["study", "question", "runs", *VERDICTS, "on the clock", "all runs", "day"]
    finished = [entry for entry in entries if entry.finished]
    verdicts = [claim["verdict"] for entry in finished if entry.data for claim in entry.data["claims"]]
    counts = ", ".join(f"{verdicts.count(one)} {one}" for one in VERDICTS)
    records = [entry.record for entry in entries if entry.record]
    parts = [
        "# Results",
        "Written by `make results`, which runs what is missing first. What a verdict means, and what toy results "
        "cannot say: [studies](studies.md).",
        f"{len(finished)} of {len(entries)} studies are finished, with {len(verdicts)} claims: {counts}. Runs took "
        f"{duration(sum(one.run_seconds for one in records))} in all, "
        f"{duration(sum(one.wall_seconds for one in records))} on the clock.",
        markdown_table(head, [_row(entry) for entry in entries]),
        "## Contradicted",
        "\n".join(_contradictions(finished)) or "No claim is.",
    ]
    return "\n\n".join([*parts, *map(_section, entries)]) + "\n"


def _row(entry: Entry) -> list[str]:
    """Of the table of all studies."""
    if entry.data is None:
        return [entry.name, "-", entry.status(), *_verdicts(entry), "-", "-", "-"]
    record = entry.record
    times = (duration(record.wall_seconds), duration(record.run_seconds), record.ended[:10]) if record else ("-",) * 3
    link = f"[{entry.name}](#{entry.name})"
    return [link, entry.data["question"], entry.status(), *_verdicts(entry), *times]


def _contradictions(entries: Sequence[Entry]) -> list[str]:
    lines = []
    for entry in entries:
        assert entry.data is not None
        for claim in entry.data["claims"]:
            if claim["verdict"] != "contradicted":
                continue
            measure = MEASURES[claim["measure"]]
            lines.append(f"- {entry.name}, {claim['name']}: {claim['statement']}")
            for one in claim["comparisons"]:
                if one["verdict"] == "contradicted":
                    found = plus_minus(Summary(one["mean"], one["standard_error"], one["n"]), measure.digits)
                    low, high = one["bootstrap_interval"]
                    lines.append(
                        f"  Would hold if {one['holds_if']}; found {found} {measure.unit} "
                        f"({low:.{measure.digits}f} to {high:.{measure.digits}f})."
                    )
    return lines


def _section(entry: Entry) -> str:
    """A study: how far it is, its plot, and its table.md one level deeper."""
    if entry.data is None:
        return f"## {entry.name}\n\nNot run."
    record = entry.record
    parts = [f"## {entry.name}", f"Runs finished: {entry.status()}. {record.words() if record else ''}".strip()]
    if entry.plot:
        parts.append(f"![{entry.data['question']}]({KEPT_NAME}/{entry.name}/{entry.plot})")
    lines = entry.table.strip().splitlines()[1:]  # its title is above
    parts.append("\n".join(f"#{line}" if line.startswith("#") else line for line in lines).strip())
    return "\n\n".join(parts)


def write_collection(entries: Sequence[Entry], out: Path) -> Path:
    """Writes out/results.md and out/results/<study>/, takes away what is kept of others; returns the page's path.

    Raises `ConfigError` where that is impossible.
    """
    kept = out / KEPT_NAME
    try:
        kept.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in entries if entry.data is not None}
        for old in kept.iterdir():
            if (old / RESULTS_NAME).is_file() and old.name not in names:
                shutil.rmtree(old)
        for entry in entries:
            if entry.folder is not None and entry.folder != kept / entry.name:
                for name in filter(None, (RESULTS_NAME, TABLE_NAME, entry.plot)):
                    (kept / entry.name / name).parent.mkdir(parents=True, exist_ok=True)
                    replace_file(kept / entry.name / name, (entry.folder / name).read_bytes())
        replace_file(out / PAGE_NAME, to_markdown(entries).encode())
    except OSError as error:
        raise ConfigError("out", str(out), f"cannot be written ({error}); choose another directory") from error
    return out / PAGE_NAME
