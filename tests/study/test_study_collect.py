"""The page of all studies: finished, half done, failed and never run ones, by hand; what contradicts comes first."""

from __future__ import annotations

import json

import pytest
import study_cases

from sparse_lm.config import ConfigError
from sparse_lm.study.claims import Less
from sparse_lm.study.collect import Entry, outstanding, read_entries, to_markdown, write_collection
from sparse_lm.study.page import write_page
from sparse_lm.study.plan import make_plan
from sparse_lm.study.results import gather, write_results
from sparse_lm.study.runner import run_dir, study_dir

LOSSES = {"dense": 2.0, "four": 1.0, "two": 1.5}
CLAIMS = (
    Less("four", "dense", name="helps", statement="Experts help."),
    Less("dense", "two", name="hurts", statement="Two experts hurt."),
)


def write(workdir, name, scale="toy", finished=6, failed=0, claims=CLAIMS):
    """A study of two seeds of which so many runs have finished, and so many of the rest failed."""
    plan = make_plan(study_cases.study(2, name=name, claims=claims), scale)
    directory = study_dir(plan, workdir)
    for i, run in enumerate(plan.runs):
        if i < finished:
            study_cases.pretend(directory, run, LOSSES[run.variant] + run.seed / 8, ended=f"2026-01-02T00:00:1{i}")
        elif i < finished + failed:
            run_dir(directory, run).mkdir(parents=True)
            (run_dir(directory, run) / "failure.json").write_text('{"error": "TrainingError: lost"}')
    results = gather(plan, directory, f"python experiments/ablate.py --study={name}")
    write_results(results, directory)
    write_page(results, directory)
    return plan, directory


def section(page: str, name: str) -> str:
    """What stands under a heading of the page."""
    return page.split(f"\n## {name}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """One finished study, one half done, one with a failure; `absent` was never run."""
    folder = tmp_path_factory.mktemp("studies")
    write(folder, "whole")
    write(folder, "half", finished=3)
    write(folder, "failing", finished=5, failed=1)
    return folder


def test_the_table_of_all_studies(workdir, tmp_path):
    page = write_collection(read_entries(workdir, ["whole", "half", "failing", "absent"]), tmp_path).read_text()
    # Runs of 10 s that end a second after each other.
    for row in (
        "| [whole](#whole) | Does it run? | 6 of 6 | 1 | 0 | 1 | 15s | 1m00s | 2026-01-02 |",
        "| [half](#half) | Does it run? | **not finished**: 3 of 6 | - | - | - | 12s | 30s | 2026-01-02 |",
        "| [failing](#failing) | Does it run? | 5 of 6, 1 failed | 1 | 1 | 0 | 14s | 50s | 2026-01-02 |",
        "| absent | - | not run | - | - | - | - | - | - |",
    ):
        assert row in page.splitlines()
    assert "2 of 4 studies are finished, with 4 claims: 2 shown, 1 not shown, 1 contradicted." in page
    assert "Runs took 2m20s in all, 41s on the clock." in page
    assert [line for line in page.splitlines() if line.startswith("#") and not line.startswith("###")] == [
        "# Results",
        *("## Contradicted", "## whole", "## half", "## failing", "## absent"),
    ]


def test_contradictions_come_first_and_only_from_what_is_finished(workdir):
    page = to_markdown(read_entries(workdir, ["half", "whole"]))
    assert section(page, "Contradicted").strip() == (
        "- whole, hurts: Two experts hurt.\n"
        "  Would hold if dense - two < 0; found 0.5000 ± 0.0000 nats / token (0.5000 to 0.5000)."
    )
    assert section(to_markdown(read_entries(workdir, ["half"])), "Contradicted").strip() == "No claim is."


def test_a_section_has_what_the_study_wrote(workdir, tmp_path):
    page = write_collection(read_entries(workdir, ["whole", "failing", "absent"]), tmp_path).read_text()
    whole = section(page, "whole")
    assert "Runs finished: 6 of 6. Run from 2026-01-02 00:00 to 00:00: 15s on the clock, 1m00s of runs;" in whole
    assert "| four | 1.0625 ± 0.0625 | 2 | 1.5 |" in whole
    assert "| hurts | Two experts hurt. | contradicted |" in whole
    assert "    python experiments/ablate.py --study=whole" in whole and "\n### Claims\n" in whole
    assert "![Does it run?](results/whole/plots/validation_loss.svg)" in whole
    picture = (tmp_path / "results" / "whole" / "plots" / "validation_loss.svg").read_bytes()
    assert picture == (workdir / "whole" / "plots" / "validation_loss.svg").read_bytes()
    assert "TrainingError: lost" in section(page, "failing")
    assert section(page, "absent").strip() == "Not run."


def test_what_is_kept_of_other_studies_goes(workdir, tmp_path):
    write_collection(read_entries(workdir, ["whole", "failing", "absent"]), tmp_path)
    (tmp_path / "results" / "notes.txt").write_text("")
    write_collection(read_entries(workdir, ["whole", "absent"]), tmp_path)
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["notes.txt", "whole"]


def test_what_is_kept_stands_in_for_what_is_not_finished_here(workdir, tmp_path):
    names, out = ["whole", "half", "failing", "absent"], tmp_path / "docs"
    before = write_collection(read_entries(workdir, names, out), out).read_text()
    again = write_collection(read_entries(tmp_path / "elsewhere", names, out), out).read_text()
    assert section(again, "whole") == section(before, "whole") and section(again, "absent").strip() == "Not run."
    write(tmp_path / "elsewhere", "whole", finished=2)
    write(tmp_path / "elsewhere", "half", finished=2)
    page = write_collection(read_entries(tmp_path / "elsewhere", names, out), out).read_text()
    assert section(page, "whole") == section(before, "whole"), "an unfinished study takes no finished one's place"
    assert "**not finished**: 2 of 6" in section(page, "half")
    write(tmp_path / "finished", "half")
    page = write_collection(read_entries(tmp_path / "finished", names, out), out).read_text()
    assert "Runs finished: 6 of 6" in section(page, "half")


def test_larger_scales_are_there_when_they_were_run(tmp_path):
    write(tmp_path, "both")
    write(tmp_path, "both", scale="small", finished=6)
    write(tmp_path, "large", scale="paper", finished=1)
    found = read_entries(tmp_path, ["both", "large"])
    assert [(entry.name, entry.finished) for entry in found] == [
        ("both", True),
        ("both-small", True),
        ("large", False),
        ("large-paper", False),
    ]
    assert "## both-small" in to_markdown(found) and not any(entry.plot is None for entry in found if entry.data)


def test_nothing_at_all():
    assert "0 of 1 studies are finished, with 0 claims" in to_markdown([Entry("absent")])


def test_what_is_outstanding(tmp_path):
    plan, directory = write(tmp_path, "counted", finished=3, failed=1)
    assert outstanding(plan, directory) == 2
    (run_dir(directory, plan.runs[4])).mkdir()
    (run_dir(directory, plan.runs[4]) / "metrics.jsonl").write_text("")
    assert outstanding(plan, directory) == 2, "one that has begun is still to be done"


@pytest.mark.parametrize("change", ["{", "[]", '{"measure": "joy"}', None])
def test_what_is_no_result_is_named(tmp_path, change):
    _, directory = write(tmp_path, "broken")
    path = directory / "results.json"
    if change is None:
        data = json.loads(path.read_text())
        del data["claims"][0]["verdict"]
        change = json.dumps(data)
    path.write_text(change)
    with pytest.raises(ConfigError, match=r"broken/results\.json.*run the study's command again"):
        read_entries(tmp_path, ["broken"])


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another directory"):
        write_collection([Entry("absent")], tmp_path / "file")
