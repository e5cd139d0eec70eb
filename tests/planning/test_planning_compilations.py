"""Compiled plans are made once, failures are told and tried again, and a stop loses nothing."""

from __future__ import annotations

import dataclasses
import io

import pytest
import tiny

from sparse_lm.planning import compilations, record
from sparse_lm.planning.catalogue import Entry
from sparse_lm.planning.plan import plan_topology, resolve

TOPOLOGY = "v5e:2x2"


@pytest.fixture(scope="module")
def entries():
    experiment = resolve(tiny.experiment()).replace(mesh__data=-1)
    return [Entry(name, experiment, "1M", "", TOPOLOGY) for name in ("small:one", "small:two", "large")]


class Compiler:
    """Stands in for experiments/plan.py; fails for the names that it is told."""

    def __init__(self, *failing):
        self.failing, self.asked = failing, []

    def __call__(self, entry, path):
        self.asked.append(entry.name)
        if entry.name in self.failing:
            return 3
        plan = plan_topology(entry.experiment, entry.topology, compile_step=False)
        content = record.describe(plan, entry.experiment, entry.topology)
        record.write(path, content | {"compiled": {"seconds": 1.0}})
        return 0


@pytest.mark.parametrize("parallel", [1, 2])
def test_what_failed_is_tried_again_and_the_rest_is_not_made_twice(entries, tmp_path, parallel):
    stream, first = io.StringIO(), Compiler("small:two")
    assert compilations.compile_all(entries, tmp_path, first, parallel, stream) == 1
    assert sorted(first.asked) == ["large", "small:one", "small:two"]
    assert set(compilations.files(entries, tmp_path)) == {"small:one", "large"}
    told = stream.getvalue().splitlines()
    assert told[0] == "3 models: 0 compiled before, 3 to do"
    assert sorted(line.split("] ")[1].split(";")[0] for line in told[1:]) == [
        "large: compiled",
        "small:one: compiled",
        "small:two: failed (status 3)",
    ]
    again = Compiler()
    assert compilations.compile_all(entries, tmp_path, again, parallel, io.StringIO()) == 0
    assert again.asked == ["small:two"]
    assert set(compilations.files(entries, tmp_path)) == {entry.name for entry in entries}


def test_a_changed_model_is_compiled_anew(entries, tmp_path):
    compilations.compile_all(entries, tmp_path, Compiler(), stream=io.StringIO())
    changed = dataclasses.replace(entries[0], experiment=entries[0].experiment.replace(train__batch_size=64))
    again = Compiler()
    compilations.compile_all([changed, *entries[1:]], tmp_path, again, stream=io.StringIO())
    assert again.asked == ["small:one"]


def test_a_variant_is_part_of_the_files_name(entries, tmp_path):
    assert compilations.file_of(entries[0], tmp_path) == tmp_path / "small-one.json"
