"""When, for how long and on what the runs of a study ran, from what each has written down."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_lm.telemetry.format import duration
from sparse_lm.telemetry.rundata import CONFIG_NAME, get, number

DONE_NAME = "done.json"
TOLD = ("python", "jax", "flax", "sparse_lm")  # of the versions, in words


@dataclasses.dataclass(frozen=True)
class Record:
    """Of the finished runs of a study.

    started, ended: local times, to the second. wall_seconds: in which at least one of them went on, so that pauses do
    not count, nor does a run that was taken up again before it was. run_seconds: of all of them together.
    machines, versions, commits: what there were, each once; versions as `name number`.
    """

    started: str
    ended: str
    wall_seconds: float
    run_seconds: float
    machines: tuple[str, ...]
    versions: tuple[str, ...]
    commits: tuple[str, ...]

    def words(self) -> str:
        """All of it in a sentence."""
        last = self.ended[11:16] if self.ended[:10] == self.started[:10] else _minute(self.ended)
        versions = [one for name in TOLD for one in self.versions if one.split(" ")[0] == name]
        commits = ", ".join(one[:10] + ("-dirty" if one.endswith("-dirty") else "") for one in self.commits)
        parts = [
            f"Run from {_minute(self.started)} to {last}: {duration(self.wall_seconds)} on the clock, "
            f"{duration(self.run_seconds)} of runs",
            " and ".join(self.machines),
            ", ".join(versions),
            f"commit {commits}" if commits else "",
        ]
        return "; ".join(part for part in parts if part) + "."


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def record(run_dirs: Iterable[Path]) -> Record | None:
    """What the finished ones of these directories have recorded; None when none of them has."""
    spans, infos = [], []
    for here in run_dirs:
        done = _json(here / DONE_NAME)
        seconds, time = number(done.get("seconds")), done.get("time")
        if seconds is None or not isinstance(time, str):
            continue
        end = datetime.datetime.fromisoformat(time)
        spans.append((end - datetime.timedelta(seconds=seconds), end))
        infos.append(_json(here / CONFIG_NAME))
    if not spans:
        return None
    versions = [f"{name} {value}" for info in infos for name, value in (get(info, "versions") or {}).items() if value]
    return Record(
        started=min(start for start, _ in spans).isoformat(timespec="seconds"),
        ended=max(end for _, end in spans).isoformat(timespec="seconds"),
        wall_seconds=covered(spans),
        run_seconds=sum((end - start).total_seconds() for start, end in spans),
        machines=_once(machine(info) for info in infos),
        versions=_once(versions),
        commits=_once(str(commit) for info in infos if (commit := get(info, "git"))),
    )


def covered(spans: Sequence[tuple[datetime.datetime, datetime.datetime]]) -> float:
    """Seconds that lie in at least one of the spans."""
    total, reached = 0.0, datetime.datetime.min
    for start, end in sorted(spans):
        start = max(start, reached)
        if end > start:
            total += (end - start).total_seconds()
            reached = end
    return total


def machine(info: Mapping[str, Any]) -> str:
    """The machine of a run in words, from its config.json: accelerators first, where there are any."""
    cores = get(info, "host", "cores")
    host = f"{get(info, 'host', 'cpu')}, {cores} core{'s' * (cores != 1)}" if cores else ""
    kind, count = get(info, "device", "kind") or get(info, "device", "platform"), get(info, "device", "count")
    if get(info, "device", "platform") == "cpu" and host:
        return host + (f", {count} virtual devices" if count and count > 1 else "")
    device = f"{count} x {kind}" if count and count > 1 else str(kind or "unknown device")
    return f"{device} ({host})" if host else device


def _once(items: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(items))


def _json(path: Path) -> Mapping[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
