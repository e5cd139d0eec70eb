"""Runs of an earlier version: taken when what they recorded means the same today, told and done anew otherwise."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import study_cases

from sparse_lm.study.plan import Plan
from sparse_lm.study.results import gather
from sparse_lm.study.runner import Ran, Shard, listing, run_dir, run_study, state_of
from sparse_lm.study.study import Variant

OLD = "0123456789"
TIGHT = {"model__moe__capacity_factor": 1.0}
ROOMY = Variant({"model__moe__capacity_factor_eval": 4.0}, evaluates="four")


@pytest.fixture
def plan() -> Plan:
    """Dense, four (with another capacity than the default), and an evaluation of that."""
    return study_cases.plan(1, variants={"four": Variant(TIGHT), "roomy": ROOMY}, claims=())


def earlier(directory: Path, plan: Plan) -> dict[str, Path]:
    """Finished runs of the plan, under the names that another version gave them; where they lie, by variant."""
    places = {}
    for run in plan.runs:
        study_cases.pretend(directory, run, 1.0)
        places[run.variant] = run_dir(directory, run).rename(directory / "runs" / f"{run.variant}-s0-{OLD}")
    return places


def edit(here: Path, path: str, **new: object) -> None:
    """Takes an option, `moe.top_k`, out of a recorded model, and puts others in its place."""
    *parents, name = path.split(".")
    info = json.loads((here / "config.json").read_text())
    node = info["config"]["model"]
    for parent in parents:
        node = node[parent]
    del node[name]
    node |= new
    (here / "config.json").write_text(json.dumps(info))


def run(plan: Plan, directory: Path) -> tuple[Ran, str]:
    """Runs what is to do, by pretending; with what was told."""
    out = io.StringIO()

    def train(experiment, workdir, stream):
        raise RuntimeError("is run")

    return run_study(plan, directory, out, train=train), out.getvalue()


def test_an_option_that_the_package_has_gained_repeats_nothing(plan, tmp_path):
    places = earlier(tmp_path, plan)
    edit(places["four"], "moe.shared_gate")
    edit(places["dense"], "attention")
    ran, told = run(plan, tmp_path)
    assert ran == Ran((), (), False) and "3 finished before" in told and "another run" not in told
    assert [run_dir(tmp_path, one) for one in plan.runs] == [places[one.variant] for one in plan.runs]
    assert {name: list(seeds) for name, seeds in gather(plan, tmp_path).measured.items()} == {
        "dense": [0],
        "four": [0],
        "roomy": [0],
    }
    assert f"finished roomy-s0-{OLD}  evaluates four-s0-{OLD}" in listing(plan, tmp_path, Shard())
    assert not (tmp_path / "runs" / plan.runs[0].name).exists()


@pytest.mark.parametrize(
    ("path", "new", "why"),
    [
        # The default was 0.5 when it ran, and the variant does not set it.
        ("moe.init_scale", {"init_scale": 0.5}, "init_scale=0.5, and now there is model.moe.init_scale=1.0"),
        # An option that it does not know, and that the variant sets.
        ("moe.capacity_factor", {}, "it had model.moe.capacity_factor=1.25, and now there is "),
        # Renamed: who knows whether the meaning is the same.
        ("moe.capacity_factor", {"room": 1.0}, "config.model.moe.room=1.0: unknown key"),
        ("moe", {"moe": None}, "it had model.moe=None, and now there is no model.moe"),
    ],
)
def test_another_run_is_told_and_kept(plan, tmp_path, path, new, why):
    here = earlier(tmp_path, plan)["four"]
    edit(here, path, **new)
    before = (here / "config.json").read_bytes()
    ran, told = run(plan, tmp_path)
    four, roomy = plan.runs[1:]
    assert ran.failed == (four.name, roomy.name), "the evaluation was of the other training"
    line = next(line for line in told.splitlines() if line.startswith(f"  {four.name} is to do: "))
    assert f"four-s0-{OLD} is another run" in line and why in line
    assert f"roomy-s0-{OLD} is another run: it evaluates four-s0-{OLD}, not {four.name}" in told
    assert (here / "config.json").read_bytes() == before and (here / "done.json").exists()
    assert run_dir(tmp_path, four).name == four.name and state_of(tmp_path, plan.runs[0]) == "finished"


def test_one_that_has_begun_goes_on_and_a_finished_one_is_preferred(plan, tmp_path):
    places, dense = earlier(tmp_path, plan), plan.runs[0]
    begun = tmp_path / "runs" / "dense-s0-0000000000"
    begun.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (begun / name).write_bytes((places["dense"] / name).read_bytes())
    assert run_dir(tmp_path, dense) == places["dense"]
    (places["dense"] / "done.json").unlink()
    assert state_of(tmp_path, dense) == "started" and run_dir(tmp_path, dense) == begun
    (begun / "config.json").write_text("{")
    assert run_dir(tmp_path, dense) == places["dense"], "what cannot be read is another run"
