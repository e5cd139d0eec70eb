"""Benchmarks are found by name, and the main says so when one is not."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest
import tiny

from sparse_lm.bench import run
from sparse_lm.bench.harness import Comparison, Options, Paired
from sparse_lm.bench.run import BENCHMARKS, Benchmark, run_benchmark, summary
from sparse_lm.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
OPTIONS = Options(tiny.experiment())
ROW = Comparison("sparse", "dense", Paired(1.5, 1.0, 2.0, 3.0, 2.0, 1), 6, 12.0, 12.0, 8.0)


def test_the_process_that_needs_the_accelerator_free_comes_first():
    assert list(BENCHMARKS) == ["startup", "moe_layer", "train_step", "experts"]


def test_a_benchmark_is_run_with_the_options(monkeypatch):
    given = []
    monkeypatch.setitem(BENCHMARKS, "fake", Benchmark(lambda options: [given.append(options), ROW][1:], "nothing"))
    made = run_benchmark("fake", OPTIONS)
    assert given == [OPTIONS]
    assert (made.name, list(made.rows)) == ("fake", [ROW])
    assert json.loads(json.dumps(made.to_json()))["rows"][0]["share_of_peak"] == 0.5


def test_the_step_is_timed_against_what_the_options_name(monkeypatch):
    monkeypatch.setattr(run, "train_step", lambda options: ["twin"])
    monkeypatch.setattr(run, "train_step_against", lambda options: [options.against])
    assert run.step(OPTIONS) == ["twin"]
    assert run.step(dataclasses.replace(OPTIONS, against="hf")) == ["hf"]


def test_an_unknown_name_is_refused_with_the_closest():
    with pytest.raises(
        ConfigError, match=r"benchmark='moe_layers': did you mean 'moe_layer'\? known: experts, moe_layer, "
    ):
        run_benchmark("moe_layers", OPTIONS)


def test_the_summary_has_a_line_for_each():
    lines = summary().splitlines()
    assert [line.split()[0] for line in lines] == list(BENCHMARKS)
    assert len({line.index(benchmark.about) for line, benchmark in zip(lines, BENCHMARKS.values(), strict=True)}) == 1


def main(*arguments):
    command = [sys.executable, str(ROOT / "experiments/bench.py"), *arguments]
    # One device: compiles sooner than the eight of the tests.
    environment = os.environ | {"XLA_FLAGS": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_main_lists():
    done = main("--list")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip() == summary()


@pytest.mark.slow
def test_the_main_measures_one(tmp_path):
    file = tmp_path / "bench.json"
    overrides = ["model.num_layers=1", "model.d_model=16", "model.d_ff=16", "data.length=16", "data.source=grammar"]
    overrides += ["model.moe.num_experts=4", "model.moe.top_k=2", "model.moe.every=1"]
    done = main("train_step", "--quick", f"--json={file}", *(f"--config.{override}" for override in overrides))
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["name"] == "train_step"
    (row,) = written["rows"]
    assert row["low"] <= row["ratio"] <= row["high"]
    assert row["repeats"] == 3
    assert "E=4 k=2 gather" in done.stdout
    assert written["machine"]["cpu"] in done.stdout
    assert file.with_suffix(".csv").is_file() and file.with_suffix(".svg").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["moe_layers"], "config.benchmark='moe_layers': did you mean 'moe_layer'?"),
        (["train_step", "--against=hf", "--quick"], "config.python=None: must be the python of an environment"),
        (["moe_layer", "--quick", "--tokens=100"], "config.tokens=100: must be a positive multiple"),
    ],
)
def test_the_main_refuses_in_one_line(arguments, says):
    done = main(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {says}")
    assert "Traceback" not in done.stderr
