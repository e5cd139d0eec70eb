"""A plan's file holds what it is of, and is read only as the plan of that."""

from __future__ import annotations

import json

import pytest
import tiny

from sparse_lm.config import ConfigError, from_dict, to_dict
from sparse_lm.experiment import Experiment
from sparse_lm.planning import record
from sparse_lm.planning.plan import plan_topology, resolve

TOPOLOGY = "v5e:2x2"


@pytest.fixture(scope="module")
def experiment():
    return resolve(tiny.experiment()).replace(mesh__data=-1)


@pytest.fixture(scope="module")
def content(experiment):
    plan = plan_topology(experiment, TOPOLOGY, compile_step=False)
    return record.describe(plan, experiment, TOPOLOGY) | {"compiled": {"seconds": 1.0}}


def test_it_says_what_it_is_of_and_by_what_it_was_made(experiment, content):
    assert content["topology"] == TOPOLOGY
    assert from_dict(Experiment, json.loads(json.dumps(content["config"]))) == experiment
    assert set(content["made"]) == {"day", "versions", "host"}
    assert set(content["made"]["versions"]) == set(record.MAKERS) and content["made"]["versions"]["jax"]
    assert content["peak"] == content["estimated_peak"] > 0 and content["roofline"]["compute"] > 0


def test_what_is_written_is_read(experiment, content, tmp_path):
    path = tmp_path / "plan.json"
    record.write(path, content)
    assert record.read(path, experiment, TOPOLOGY) == json.loads(json.dumps(content))


def test_what_the_compiler_gave_up_on_is_read_too(experiment, content, tmp_path):
    path = tmp_path / "plan.json"
    record.write(path, content | {"source": "estimated", "compiled": {"seconds": 1.0, "message": "too large"}})
    assert record.read(path, experiment, TOPOLOGY)["compiled"]["message"] == "too large"


@pytest.mark.parametrize("change", ["nothing", "slice", "experiment", "versions", "estimate", "torn"])
def test_another_plan_is_not_read(experiment, content, tmp_path, change):
    path, topology, written = tmp_path / "plan.json", TOPOLOGY, dict(content)
    if change == "slice":
        topology = "v5e:4x4"
    if change == "experiment":
        written["config"] = to_dict(experiment.replace(train__batch_size=1024))
    if change == "versions":
        written["made"] = content["made"] | {"versions": content["made"]["versions"] | {"jax": "0.1"}}
    if change == "estimate":
        written["compiled"] = None
    if change != "nothing":
        record.write(path, written)
    if change == "torn":
        path.write_bytes(path.read_bytes()[:-20])
    assert record.read(path, experiment, topology) is None


def test_a_folder_that_is_not_there_is_named(content, tmp_path):
    with pytest.raises(ConfigError, match=r"json='.*none/plan.json'.*cannot be written"):
        record.write(tmp_path / "none" / "plan.json", content)
