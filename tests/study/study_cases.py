"""A study so small that all of its runs take seconds, and results that look like those of one, for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tiny

from sparse_lm.config import to_dict
from sparse_lm.experiment import resolved
from sparse_lm.study.claims import Less, Within
from sparse_lm.study.plan import Plan, Run, make_plan
from sparse_lm.study.runner import DONE_NAME, run_dir
from sparse_lm.study.study import SCALES, Scale, Source, Study, Variant
from sparse_lm.train.restore import tokenizer_of

SOURCE = Source("A paper", "0000.00000", "table 1")


def study(seeds: int = 2, steps: int = 4, **changes: Any) -> Study:
    """Two variants of the tiny experiment, two claims."""
    base = tiny.experiment(
        model__moe__d_expert=8, train__steps=steps, train__eval_every=2, train__eval_batches=1, checkpoint__every=2
    )
    scale = Scale(base, seeds)
    given: dict[str, Any] = {
        "name": "tiny",
        "question": "Does it run?",
        "source": SOURCE,
        "scales": dict.fromkeys(SCALES, scale),
        "variants": {"four": Variant(paper=1.5), "two": Variant({"model__moe__num_experts": 2})},
        "claims": (
            Less("four", "dense", name="helps", statement="Experts help."),
            Within("four", "two", 10.0, name="same", statement="Their number matters little."),
        ),
        "unit": "nats",
    }
    return Study(**(given | changes))


def plan(seeds: int = 2, **changes: Any) -> Plan:
    """The plan of the tiny study."""
    return make_plan(study(seeds, **changes), "toy")


def pretend(
    directory: Path, run: Run, loss: float, seconds: float = 10.0, ended: str = "2026-01-02T03:04:30", **values: Any
) -> None:
    """Writes what a finished run leaves behind: ten steps, evaluated at 5 and 10, with this loss at the end."""
    here = run_dir(directory, run)
    here.mkdir(parents=True)
    info: dict[str, Any] = {
        "config": to_dict(resolved(run.experiment, tokenizer_of(run.experiment.data).vocab_size)),
        "data": {"fingerprint": "f"},
        "device": {"platform": "wood", "kind": "abacus", "count": 1},
        "host": {"cpu": "Some CPU", "cores": 2},
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "git": "0123456789abcdef",
        "parameters": {"total": 100, "active": 50, "flops_per_token": 600},
    }
    if run.training is not None:
        info["evaluates"] = run_dir(directory, run.training).name
    (here / "config.json").write_text(json.dumps(info))
    rows = []
    for step in range(1, 11):
        row = {"step": step, "split": "train", "loss": 2.0, "seconds": seconds * step / 10, "gradient_norm": 1.0}
        row |= {"tokens_per_second": 256.0, "max_violation": 0.25, "dropped_fraction": 0.125, "router_z": 3.0}
        row["layers"] = {"load": [[0.5, 0.45, 0.05, 0.0]]}
        rows.append(row | values)
        if step in (5, 10):
            rows.append({"step": step, "split": "validation", "loss": loss + (10 - step) / 5, "bits_per_byte": None})
    (here / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / DONE_NAME).write_text(json.dumps({"key": run.key, "seconds": seconds, "time": ended}))
