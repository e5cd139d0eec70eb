"""A real Ray cluster on this machine: runs in its processes, failures, deaths, signals, and the same directories."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import jax
import pytest
import ray
import study_cases
from ray.cluster_utils import Cluster as LocalCluster

from sparse_lm.config import ConfigError
from sparse_lm.study import ray_engine
from sparse_lm.study.ray_engine import Cluster, run_on_ray
from sparse_lm.study.runner import Shard, failure_of, run_dir, state_of
from sparse_lm.study.study import Variant
from sparse_lm.train.loop import TrainingError
from sparse_lm.train.signals import on_signals

AGAIN = {"four": Variant(), "same": Variant(evaluates="four")}


def outcome(stopped: bool = False):
    """What a training returns."""
    return SimpleNamespace(outcome=SimpleNamespace(stopped=stopped, last={"validation": {"loss": 1.0}}))


def note(experiment, workdir, stream):
    """A training that writes down where it runs."""
    settings = {name: jax.config.values[name] for name in ray_engine.SETTINGS}
    (workdir / "metrics.jsonl").write_text(json.dumps({"process": os.getpid(), "settings": settings}))
    return outcome()


def fail_with_experts(experiment, workdir, stream):
    """A training that only goes well without experts."""
    if experiment.model.moe is not None:
        raise TrainingError("the loss is lost")
    return note(experiment, workdir, stream)


def die_with_experts(experiment, workdir, stream):
    """A training whose process dies with experts, as when memory runs out."""
    note(experiment, workdir, stream)
    if experiment.model.moe is not None:
        os._exit(7)
    return outcome()


def wait_for_a_signal(experiment, workdir, stream):
    """A training that saves and ends when it is told to, as the loop does."""
    stop = []
    with on_signals(lambda number, _: stop.append(number)):
        (workdir / "metrics.jsonl").write_text("{}")
        while not stop:
            time.sleep(0.01)
    (workdir / "saved").touch()
    return outcome(stopped=True)


def evaluate(run, trained, here, stream):
    """An evaluation that writes down in which process it was."""
    (here / "process").write_text(str(os.getpid()))
    return 0.5


@pytest.fixture(scope="module")
def cluster():
    """Two processes on this machine that import what these tests do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        yield Cluster(started.address)
        started.shutdown()


@pytest.mark.slow
def test_runs_and_their_evaluations_go_to_processes_of_the_cluster(cluster, tmp_path):
    plan, out, ended = study_cases.plan(1, variants=AGAIN, claims=()), io.StringIO(), []
    ran = run_on_ray(plan, tmp_path, out, cluster, after=lambda: ended.append(1), work=(note, evaluate))
    assert sorted(ran.finished) == sorted(run.name for run in plan.runs) and not ran.failed and not ran.stopped
    assert len(ended) == 3 and "[3/3]" in out.getvalue() and "validation loss 0.5000" in out.getvalue()
    notes = [json.loads((run_dir(tmp_path, run) / "metrics.jsonl").read_text()) for run in plan.runs[:2]]
    assert os.getpid() not in {one["process"] for one in notes}
    assert all(one["settings"] == {name: jax.config.values[name] for name in ray_engine.SETTINGS} for one in notes)
    assert (run_dir(tmp_path, plan.runs[2]) / "process").read_text() == str(notes[1]["process"])
    out = io.StringIO()
    assert run_on_ray(plan, tmp_path, out, cluster, work=(note, evaluate)).finished == ()
    assert "3 finished before, 0 failed before, 0 to do" in out.getvalue() and not ray.is_initialized()


@pytest.mark.slow
def test_failures_are_recorded_reported_and_retried_on_request(cluster, tmp_path):
    plan, out = study_cases.plan(1), io.StringIO()
    ran = run_on_ray(plan, tmp_path, out, cluster, work=(fail_with_experts, evaluate))
    assert ran.finished == (plan.runs[0].name,) and sorted(ran.failed) == sorted(run.name for run in plan.runs[1:])
    assert failure_of(tmp_path, plan.runs[1]) == "TrainingError: the loss is lost"
    assert "failed, TrainingError: the loss is lost" in out.getvalue()
    assert len(run_on_ray(plan, tmp_path, io.StringIO(), cluster, work=(note, evaluate)).failed) == 2
    again = run_on_ray(plan, tmp_path, io.StringIO(), cluster, (Shard(1, 3), True), work=(note, evaluate))
    assert again.finished == (plan.runs[1].name,) and again.failed == ()
    assert state_of(tmp_path, plan.runs[2]) == "failed", "of another shard"


@pytest.mark.slow
def test_a_process_that_dies_is_told_and_goes_on_with_the_next_call(cluster, tmp_path):
    plan, out = study_cases.plan(1), io.StringIO()
    ran = run_on_ray(plan, tmp_path, out, cluster, work=(die_with_experts, evaluate))
    assert ran.finished == (plan.runs[0].name,) and len(ran.failed) == 2
    assert "the same command goes on with it" in out.getvalue()
    assert [state_of(tmp_path, run) for run in plan.runs] == ["finished", "started", "started"]
    assert len(run_on_ray(plan, tmp_path, io.StringIO(), cluster, work=(note, evaluate)).finished) == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_runs_and_drops_what_waits(cluster, tmp_path, number):
    plan, out, before = study_cases.plan(1), io.StringIO(), signal.getsignal(number)

    def interrupt():
        deadline = time.monotonic() + 60
        while len(list(tmp_path.glob("runs/*/metrics.jsonl"))) < 2:
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    ran = run_on_ray(plan, tmp_path, out, cluster, work=(wait_for_a_signal, evaluate))
    thread.join()
    assert ran.stopped and ran.finished == ran.failed == () and "the same command goes on" in out.getvalue()
    assert len(list(tmp_path.glob("runs/*/saved"))) == 2, "both that ran have saved, the third never began"
    assert sorted(state_of(tmp_path, run) for run in plan.runs) == ["started", "started", "waiting"]
    assert signal.getsignal(number) == before


def test_a_task_ends_with_what_is_stopped(tmp_path):
    plan = study_cases.plan(1, variants=AGAIN, claims=())
    job, settings = plan.jobs[1], {name: jax.config.values[name] for name in ray_engine.SETTINGS}
    ended = ray_engine.run_job(job, str(tmp_path), settings, (lambda *_: outcome(stopped=True), evaluate))
    assert ended == [] and [state_of(tmp_path, run) for run in job] == ["waiting", "waiting"]
    ended = ray_engine.run_job(job, str(tmp_path), settings, (note, evaluate))
    assert [words.split(",")[0] for words in ended] == ["validation loss 1.0000", "validation loss 0.5000"]


def test_a_task_has_the_settings_of_the_caller(tmp_path):
    name = "jax_persistent_cache_min_compile_time_secs"
    before = jax.config.values[name]
    try:
        ray_engine.run_job((), str(tmp_path), {name: before + 1}, (note, evaluate))
        assert jax.config.values[name] == before + 1
    finally:
        jax.config.update(name, before)


@pytest.mark.slow
def test_what_the_cluster_does_not_have_is_told_and_waited_for(cluster, tmp_path):
    plan, out = study_cases.plan(1), io.StringIO()
    thread = threading.Timer(8, os.kill, (os.getpid(), signal.SIGTERM))
    thread.start()
    ran = run_on_ray(plan, tmp_path, out, Cluster(cluster.address, {"CPU": 1, "TPU": 4}), work=(note, evaluate))
    assert ran.stopped and not ran.finished and "the cluster has no TPU=4 now" in out.getvalue()
    thread.join()


def test_what_a_run_reserves():
    found = Cluster.parse("auto", "CPU=2,GPU=0.5,TPU=4")
    assert found == Cluster("auto", {"CPU": 2.0, "GPU": 0.5, "TPU": 4.0})
    assert found.options() == {"num_cpus": 2.0, "num_gpus": 0.5, "resources": {"TPU": 4.0}, "max_retries": 0}
    for text in ("CPU", "CPU=", "CPU=x", "=1", "CPU=1,", "CPU=-1"):
        with pytest.raises(ConfigError, match="CPU=2,GPU=1"):
            Cluster.parse("auto", text)


def test_without_ray_or_without_a_cluster(monkeypatch, tmp_path):
    plan = study_cases.plan(1)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1:1.*no cluster answers"):
        run_on_ray(plan, tmp_path, io.StringIO(), Cluster("127.0.0.1:1"))
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"ray='auto'.*pip install -e '\.\[ray\]'"):
        run_on_ray(plan, tmp_path, io.StringIO(), Cluster("auto"))


def refuse(**_):
    """Stands for `ray.init`, which tries for a minute to reach nobody."""
    raise ConnectionError("nobody there")
