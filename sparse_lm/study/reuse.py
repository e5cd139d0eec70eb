"""Runs that were done under another name, because the package has other options since: found by what they recorded.

A run is named by the hash of its whole configuration, so that each option that the package gains renames them all.
What was recorded, read as a configuration of today, decides: an option that the record does not know stands at its
default, every other one at the recorded value, and one that the package no longer knows makes it another run.
"""

from __future__ import annotations

import json
from pathlib import Path

from sparse_lm.config import ConfigError, dotted, to_dict
from sparse_lm.experiment import resolved
from sparse_lm.study.plan import Run
from sparse_lm.study.record import DONE_NAME
from sparse_lm.telemetry.rundata import CONFIG_NAME
from sparse_lm.train.restore import tokenizer_of
from sparse_lm.train.run import read_info


def find_run(own: Path, run: Run, trained: str | None = None) -> tuple[Path, list[str]]:
    """The directory of a run: `own`, unless only another one records the same, finished ones first.

    trained: the name of the directory that an evaluation evaluates. With it comes, for every finished directory of the
    variant and seed that holds another run, a line that says why; none when `own` is there.
    """
    if own.exists():
        return own, []
    same, others = [], []
    for here in sorted(own.parent.glob("*")):
        if here.name.rpartition("-")[0] != own.name.rpartition("-")[0] or not (here / CONFIG_NAME).exists():
            continue
        why = difference(here, run, trained)
        if why is None:
            same.append(here)
        elif (here / DONE_NAME).exists():
            others.append(f"{here.name} is another run: {why}")
    return min(same, key=lambda here: not (here / DONE_NAME).exists(), default=own), others


def difference(here: Path, run: Run, trained: str | None = None) -> str | None:
    """Why the run that a directory records is another one, with the first key that differs; None when it is not."""
    try:
        info = read_info(here)
    except ConfigError as error:
        return error.why
    assert info is not None, here
    evaluates = json.loads((here / CONFIG_NAME).read_text(encoding="utf-8")).get("evaluates")
    if evaluates != trained:
        return f"it evaluates {evaluates}, not {trained}"
    now = dotted(to_dict(resolved(run.experiment, tokenizer_of(run.experiment.data).vocab_size)))
    then = dotted(to_dict(info.experiment))
    for key in sorted(then.keys() | now.keys()):
        before, today = (f"{key}={tree[key]!r}" if key in tree else f"no {key}" for tree in (then, now))
        if before != today:
            return f"it had {before}, and now there is {today}"
    return None
