"""The command line of studies: from a file to a page, again at no cost, in parts, and mistakes in one line."""

from __future__ import annotations

import json
import signal
import time

import mains
import pytest
import tiny

STUDY = """
import study_cases
from sparse_lm.study.study import Variant
STUDY = study_cases.study(1, variants={"four": Variant()}, claims=())
"""
FAILING = """
import study_cases
from sparse_lm.study.study import Variant
missing = Variant({"data__source": "text", "data__path": "nowhere"}, matched=False)
STUDY = study_cases.study(variants={"text": missing}, claims=())
"""


@pytest.fixture
def ablate(tmp_path, monkeypatch):
    """Calls the main with a study of this text; exit status, output and errors."""
    monkeypatch.setenv("PYTHONPATH", str(mains.ROOT / "tests"))

    def call(*arguments: str, study: str = STUDY, main=mains.call):
        file = tmp_path / "mine.py"
        folder = mains.ROOT / "tests" / "study"
        file.write_text(f"import sys; sys.path.insert(0, {str(folder)!r})\n{study}")
        return main("ablate", f"--study={file}", f"--workdir={tmp_path / 'out'}", *arguments)

    return call


@pytest.mark.slow
def test_parts_side_by_side_then_the_whole_again(ablate, tmp_path):
    status, out, errors = ablate("--parallel=2")
    assert status == 0, errors
    folder = tmp_path / "out" / "tiny"
    found = json.loads((folder / "results.json").read_text())
    assert found["complete"] and found["runs"]["finished"] == 2
    assert found["variants"]["four"]["n"] == 1 and found["command"].startswith("python experiments/ablate.py --study=")
    assert {"table.md", "report.html", "plots", "runs"} <= {path.name for path in folder.iterdir()}
    assert "Power: " in out
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/metrics.jsonl")}
    status, out, _ = ablate()
    assert status == 0 and "2 finished before, 0 failed before, 0 to do" in out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and len(stamps) == 2
    status, out, _ = ablate("--list")
    assert status == 0 and out.count("finished ") == 2


@pytest.mark.slow
def test_a_failure_does_not_stop_the_others_and_is_the_exit_status(ablate, tmp_path):
    status, out, _ = ablate("--seeds=1", study=FAILING)
    assert status == 1 and "failed, ConfigError" in out
    found = json.loads((tmp_path / "out" / "tiny" / "results.json").read_text())
    assert found["runs"] == {"finished": 1, "failed": 1, "started": 0, "waiting": 0}
    assert found["variants"]["text"]["n"] == 0


@pytest.mark.slow
def test_a_signal_in_the_middle_of_a_run_saves_it_and_the_same_command_goes_on(ablate, tmp_path):
    study = STUDY.replace("(1,", "(1, steps=60,")
    process, runs = ablate(study=study, main=mains.start), tmp_path / "out" / "tiny" / "runs"
    while process.poll() is None and not list(runs.glob("*/metrics.jsonl")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "the same command goes on from there" in out, errors
    assert not list(runs.glob("*/done.json"))
    (started,) = runs.glob("dense-*")
    status, out, errors = ablate(study=study)
    assert status == 0 and "0 finished before" in out, errors
    assert len(list(runs.glob("*/done.json"))) == 2
    assert "resuming" in (started / "train.log").read_text()
    assert len(tiny.losses(started)) == 60


@pytest.mark.slow
def test_a_study_on_ray_is_saved_by_a_signal_and_goes_on(ablate, tmp_path):
    study = STUDY.replace("(1,", "(1, steps=200,")
    process, runs = ablate("--ray=local", study=study, main=mains.start), tmp_path / "out" / "tiny" / "runs"
    while process.poll() is None and not list(runs.glob("*/metrics.jsonl")):
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "the same command goes on from there" in out, errors
    started = [path.parent for path in runs.glob("*/metrics.jsonl") if not (path.parent / "done.json").exists()]
    assert started
    status, out, errors = ablate("--ray=local", "--per_run=CPU=1", study=study)
    assert status == 0 and "results in" in out, errors
    assert len(list(runs.glob("*/done.json"))) == 2
    for run in started:
        assert "resuming" in (run / "train.log").read_text() and len(tiny.losses(run)) == 200


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scale=huge"], "config.scale='huge'"),
        (["--shard=2/2"], "config.shard='2/2'"),
        (["--study=configs/ablations/nothing.py"], "there is no such file"),
    ],
)
def test_a_mistake_is_one_line(ablate, arguments, words):
    status, _, errors = ablate(*arguments)
    assert status == 2 and "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words in line
