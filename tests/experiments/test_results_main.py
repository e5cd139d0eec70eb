"""The command that puts all studies on one page: it collects without running, and mistakes are one line."""

from __future__ import annotations

import mains
import pytest


def test_collecting_lists_what_was_never_run(tmp_path):
    studies = f"--workdir={tmp_path / 'none'} --out={tmp_path / 'docs'} --nothing_new"
    status, out, errors = mains.call("results", *studies.split())
    assert status == 0 and f"results in {tmp_path / 'docs' / 'results.md'}" in out, errors
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "0 of 20 studies are finished" in page and "| experts | - | not run |" in page
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_study_that_there_is_not(tmp_path):
    status, _, errors = mains.call("results", "--studies=expert", f"--workdir={tmp_path}", f"--out={tmp_path}")
    assert status == 2 and "did you mean 'experts'" in errors and "Traceback" not in errors
