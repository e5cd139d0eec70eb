"""Running: nothing twice, failures recorded and retried, stopped ones resumed, shards apart. One study is trained."""

from __future__ import annotations

import io
import json
import os
import signal
from types import SimpleNamespace

import pytest
import study_cases
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.study.plan import make_plan
from sparse_lm.study.results import gather
from sparse_lm.study.runner import Shard, failure_of, listing, run_dir, run_study, state_of, study_dir
from sparse_lm.study.study import Variant
from sparse_lm.train.loop import TrainingError
from sparse_lm.train.session import train


class FakeTrain:
    """Stands for a training: remembers what it ran, and fails or is stopped where told."""

    def __init__(self, fails=(), stops=()):
        self.ran: list[str] = []
        self.fails, self.stops = set(fails), set(stops)

    def __call__(self, experiment, workdir, stream):
        name = workdir.name.rpartition("-")[0]
        self.ran.append(name)
        stream.write("trained\n")
        if name in self.fails:
            raise TrainingError("the loss is lost\nsecond line")
        last = {"validation": {"loss": 1.0}}
        return SimpleNamespace(outcome=SimpleNamespace(stopped=name in self.stops, last=last))


AGAIN = {
    "tight": Variant({"model__moe__capacity_factor": 1.0, "model__moe__capacity_factor_eval": 0.5}),
    "same": Variant(evaluates="tight"),
    "roomy": Variant({"model__moe__capacity_factor_eval": 2.0}, evaluates="tight"),
}
ALL = ["dense-s0", "four-s0", "two-s0", "dense-s1", "four-s1", "two-s1"]


def test_nothing_is_run_twice(tmp_path):
    plan, fake, out, ended = study_cases.plan(), FakeTrain(), io.StringIO(), []
    ran = run_study(plan, tmp_path, out, train=fake, after=lambda: ended.append(len(fake.ran)))
    assert fake.ran == ALL and ran.finished == tuple(run.name for run in plan.runs) and not ran.stopped
    assert ended == [1, 2, 3, 4, 5, 6]
    assert "[6/6] two-s1" in out.getvalue() and "validation loss 1.0000" in out.getvalue()
    assert (run_dir(tmp_path, plan.runs[0]) / "train.log").read_text() == "trained\n"
    again = FakeTrain()
    assert run_study(plan, tmp_path, io.StringIO(), train=again).finished == () and again.ran == []


def test_what_has_changed_is_another_run(tmp_path):
    run_study(study_cases.plan(1), tmp_path, io.StringIO(), train=FakeTrain())
    fake = FakeTrain()
    run_study(study_cases.plan(1, steps=8), tmp_path, io.StringIO(), train=fake)
    assert fake.ran == ALL[:3]


def test_more_seeds_run_only_what_is_new(tmp_path):
    run_study(study_cases.plan(1), tmp_path, io.StringIO(), train=FakeTrain())
    fake = FakeTrain()
    run_study(study_cases.plan(2), tmp_path, io.StringIO(), train=fake)
    assert fake.ran == ALL[3:]


def test_failures_are_recorded_and_only_retried_on_request(tmp_path):
    plan, out = study_cases.plan(1), io.StringIO()
    ran = run_study(plan, tmp_path, out, train=FakeTrain(fails=["four-s0"]))
    assert ran.failed == (plan.runs[1].name,) and len(ran.finished) == 2
    assert [state_of(tmp_path, run) for run in plan.runs] == ["finished", "failed", "finished"]
    assert failure_of(tmp_path, plan.runs[1]) == "TrainingError: the loss is lost"
    assert "Traceback" in (run_dir(tmp_path, plan.runs[1]) / "train.log").read_text()
    assert "failed, TrainingError: the loss is lost" in out.getvalue()
    quiet, out = FakeTrain(), io.StringIO()
    assert run_study(plan, tmp_path, out, train=quiet).failed == (plan.runs[1].name,)
    assert quiet.ran == [] and "--retry" in out.getvalue()
    fake = FakeTrain()
    assert run_study(plan, tmp_path, io.StringIO(), retry=True, train=fake).failed == ()
    assert fake.ran == ["four-s0"] and state_of(tmp_path, plan.runs[1]) == "finished"
    assert failure_of(tmp_path, plan.runs[1]) == ""


def test_a_stopped_training_ends_the_call_and_is_taken_up_again(tmp_path):
    plan, out = study_cases.plan(1), io.StringIO()
    ran = run_study(plan, tmp_path, out, train=FakeTrain(stops=["four-s0"]))
    assert ran.stopped and len(ran.finished) == 1 and "the same command goes on" in out.getvalue()
    fake = FakeTrain()
    assert not run_study(plan, tmp_path, io.StringIO(), train=fake).stopped
    assert fake.ran == ["four-s0", "two-s0"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_outside_of_the_training_loop_is_no_failure(tmp_path, number):
    plan, before = study_cases.plan(1), signal.getsignal(number)

    def interrupted(experiment, workdir, stream):
        os.kill(os.getpid(), number)

    assert run_study(plan, tmp_path, io.StringIO(), train=interrupted).stopped
    assert state_of(tmp_path, plan.runs[0]) == "waiting" and failure_of(tmp_path, plan.runs[0]) == ""
    assert signal.getsignal(number) == before


def test_shards_cover_everything_once():
    plan = study_cases.plan(variants=AGAIN, claims=())
    runs, jobs = plan.runs, plan.jobs
    for count in (1, 2, 3, 6, 8):
        parts = [Shard(i, count).of(jobs) for i in range(count)]
        assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in runs)
        for part in parts:
            for i, run in enumerate(part):
                assert run.training is None or run.training in part[:i], "evaluated before, or elsewhere than, trained"
    split = [run for part in Shard(1, 2).split(2) for run in part.of(jobs)]
    assert sorted(run.name for run in split) == sorted(run.name for run in Shard(1, 2).of(jobs))
    assert Shard.parse("1/3") == Shard(1, 3)


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "1/0", "1/2/3"])
def test_a_shard_that_is_none(text):
    with pytest.raises(ConfigError, match="shard"):
        Shard.parse(text)


def test_a_shard_runs_its_own_only(tmp_path):
    fake = FakeTrain()
    run_study(study_cases.plan(), tmp_path, io.StringIO(), Shard(1, 4), train=fake)
    assert fake.ran == ["four-s0", "two-s1"]


def test_an_evaluation_goes_after_its_training_and_fails_with_it(tmp_path):
    plan, evaluated, out = study_cases.plan(1, variants=AGAIN, claims=()), [], io.StringIO()

    def evaluate(run, trained, here, stream):
        evaluated.append((run.variant, trained.name, here.name))
        return 0.5

    ran = run_study(plan, tmp_path, out, train=FakeTrain(fails=["tight-s0"]), evaluate=evaluate)
    names = {run.variant: run.name for run in plan.runs}
    assert ran.finished == (names["dense"],) and ran.failed == (names["tight"], names["same"], names["roomy"])
    assert evaluated == [] and f"its training {names['tight']} is failed" in failure_of(tmp_path, plan.runs[3])
    fake = FakeTrain()
    ran = run_study(plan, tmp_path, out, retry=True, train=fake, evaluate=evaluate)
    assert fake.ran == ["tight-s0"] and ran.failed == ()
    assert evaluated == [(name, names["tight"], names[name]) for name in ("same", "roomy")]
    assert "validation loss 0.5000" in out.getvalue()
    assert f"waiting  {names['roomy']}  evaluates {names['tight']}" in listing(plan, tmp_path / "new", Shard())


def test_listing(tmp_path):
    plan = study_cases.plan(1)
    run_study(plan, tmp_path, io.StringIO(), Shard(0, 3), train=FakeTrain())
    lines = listing(plan, tmp_path, Shard())
    assert [line.split()[:2] for line in lines] == [
        ["finished", plan.runs[0].name],
        ["waiting", plan.runs[1].name],
        ["waiting", plan.runs[2].name],
    ]
    assert "4 steps" in lines[0] and "FLOPs/token" in lines[0]


def test_scales_have_folders_of_their_own(tmp_path):
    study = study_cases.study()
    assert study_dir(make_plan(study, "toy"), tmp_path) == tmp_path / "tiny"
    assert study_dir(make_plan(study, "paper"), tmp_path) == tmp_path / "tiny-paper"


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="workdir"):
        run_study(study_cases.plan(1), tmp_path / "file", io.StringIO(), train=FakeTrain())


def test_a_real_study_trains_evaluates_and_resumes_after_a_stop(tmp_path):
    plan = study_cases.plan(1, variants={"four": Variant()}, claims=())

    def once_stopped(experiment, workdir, stream):
        """A signal after the first checkpoint, in the first run with experts."""
        if workdir.name == plan.runs[1].name and not (workdir / "metrics.jsonl").exists():
            shorter = experiment.replace(train__steps=2)
            train(shorter, workdir, stream)
            return SimpleNamespace(outcome=SimpleNamespace(stopped=True, last={}))
        return train(experiment, workdir, stream)

    assert run_study(plan, tmp_path, io.StringIO(), train=once_stopped).stopped
    assert [state_of(tmp_path, run) for run in plan.runs] == ["finished", "started"]
    assert not run_study(plan, tmp_path, io.StringIO(), train=once_stopped).stopped
    here = run_dir(tmp_path, plan.runs[1])
    assert len(tiny.losses(here)) == 4 and "checkpoint of step 2 found" in (here / "train.log").read_text()
    found = gather(plan, tmp_path)
    assert found.complete and set(found.values["validation_loss"]) == {"dense", "four"}
    for variant, seeds in found.measured.items():
        cost = plan.costs[variant]
        assert (seeds[0].parameters, seeds[0].flops_per_token) == (cost.parameters, cost.flops_per_token)
        stored = json.loads((run_dir(tmp_path, plan.runs[plan.variants.index(variant)]) / "config.json").read_text())
        assert stored["config"]["data_seed"] == 0
