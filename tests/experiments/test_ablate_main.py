"""The command line of studies: from a file to a page, again at no cost, in parts, and mistakes in one line."""

from __future__ import annotations

import json

import mains
import pytest

STUDY = """
import study_cases
STUDY = study_cases.study(1)
"""
FAILING = """
import study_cases
from sparse_lm.study.study import Variant
STUDY = study_cases.study(variants={"four": Variant(), "two": Variant({"train__batch_size": 8, "data__source": "text",
    "data__path": "nowhere"})}, flop_tolerance=0.9)
"""


@pytest.fixture
def ablate(tmp_path, monkeypatch):
    """Calls the main with a study of this text; exit status, output and errors."""
    monkeypatch.setenv("PYTHONPATH", str(mains.ROOT / "tests"))

    def call(*arguments: str, study: str = STUDY):
        file = tmp_path / "mine.py"
        folder = mains.ROOT / "tests" / "study"
        file.write_text(f"import sys; sys.path.insert(0, {str(folder)!r})\n{study}")
        return mains.call("ablate", f"--study={file}", f"--workdir={tmp_path / 'out'}", *arguments)

    return call


def test_parts_side_by_side_then_the_whole_again(ablate, tmp_path):
    status, out, errors = ablate("--parallel=2")
    assert status == 0, errors
    folder = tmp_path / "out" / "tiny"
    found = json.loads((folder / "results.json").read_text())
    assert found["complete"] and found["runs"]["finished"] == 3
    assert found["variants"]["four"]["n"] == 1 and found["command"].startswith("python experiments/ablate.py --study=")
    assert {"table.md", "report.html", "plots", "runs"} <= {path.name for path in folder.iterdir()}
    assert "Power: " in out
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "runs").glob("*/metrics.jsonl")}
    status, out, _ = ablate()
    assert status == 0 and "3 finished before, 0 failed before, 0 to do" in out
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps and len(stamps) == 3
    status, out, _ = ablate("--list")
    assert status == 0 and out.count("finished ") == 3


def test_a_failure_does_not_stop_the_others_and_is_the_exit_status(ablate, tmp_path):
    status, out, _ = ablate("--seeds=1", study=FAILING)
    assert status == 1 and "failed, ConfigError" in out
    found = json.loads((tmp_path / "out" / "tiny" / "results.json").read_text())
    assert found["runs"] == {"finished": 2, "failed": 1, "started": 0, "waiting": 0}
    assert found["variants"]["two"]["n"] == 0


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
