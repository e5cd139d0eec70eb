"""The nearest change that fits: in which order it is looked for, and what is said when there is none."""

from __future__ import annotations

import dataclasses

import pytest
import tiny

from sparse_lm.planning.advice import LOSS_CHUNK, advise, candidates
from sparse_lm.planning.chips import parse_topology
from sparse_lm.planning.plan import OutOfMemory, plan_topology, resolve


@pytest.fixture(scope="module")
def config():
    return resolve(tiny.experiment(model__dropout=0.0, train__batch_size=32))


@pytest.fixture(scope="module")
def base(config):
    return plan_topology(config, "v5e:2x2", compile_step=False)


class Planner:
    """Plans whose peaks are what a function of the experiment says; keeps what was asked."""

    def __init__(self, base, peak, compiled_factor=None):
        self.base, self.peak, self.factor, self.asked = base, peak, compiled_factor, []

    def __call__(self, experiment, compile_step):
        self.asked.append((experiment, compile_step))
        return self.plan(self.peak(experiment), compile_step)

    def plan(self, peak, compile_step=False):
        working = peak - self.base.state.kept - self.base.state.gradients - self.base.estimate.activations
        estimate = dataclasses.replace(self.base.estimate, working=working)
        plan = dataclasses.replace(self.base, estimate=estimate, compiled=None)
        if compile_step and self.factor:
            plan = dataclasses.replace(plan, compiled=OutOfMemory(1.0, int(peak * self.factor), "Used"))
        return plan


GB = 10**9


def test_the_first_change_that_fits_is_taken(config, base):
    planner = Planner(base, lambda experiment: 40 * GB // experiment.train.accumulate)
    found = advise(config, planner.plan(40 * GB), planner)
    assert found.changes == {"train.accumulate": 4}
    assert (found.plan.peak, found.compiled) == (10 * GB, 0)
    assert "--config.train.accumulate=4" in found.text() and "estimated" in found.text()


def test_cheap_changes_come_before_those_that_compute_again(config, base):
    changes = list(candidates(config, base.mesh))
    first = {key: min(i for i, c in enumerate(changes) if key in c) for key in ("train.accumulate", "model.remat")}
    assert changes[0] == {"model.loss_chunk": LOSS_CHUNK}
    assert first["train.accumulate"] < first["model.remat"] < changes.index({"mesh.data": 1, "mesh.fsdp": 4})
    assert len({tuple(sorted(c.items())) for c in changes}) == len(changes)


def test_less_room_for_exchanged_rows_is_advised_where_there_is_some(config, base):
    moe = config.model.moe.replace(capacity_factor=None, capacity_factor_eval=None, dispatcher="ragged_all_to_all")
    ragged = config.replace(model__moe=moe)
    chunk, room = {"model.loss_chunk": LOSS_CHUNK}, {"model.moe.exchange_room": 1.0}
    changes = list(candidates(ragged, base.mesh))
    assert changes[:4] == [chunk, room, chunk | room, {"train.accumulate": 2}]
    assert {"model.remat": "full"} | chunk | room in changes
    assert len({tuple(sorted(c.items())) for c in changes}) == len(changes)
    tight = ragged.replace(model__moe__exchange_room=1.0)
    assert not any(room.items() <= c.items() for other in (config, tight) for c in candidates(other, base.mesh))


def test_what_is_set_already_is_not_advised(config, base):
    done = config.replace(model__remat="full", model__loss_chunk=64)
    assert not any({"model.remat", "model.loss_chunk"} & set(c) for c in candidates(done, base.mesh))


def test_changes_that_the_configuration_refuses_are_left_out(config, base):
    planner = Planner(base, lambda experiment: 40 * GB)
    advise(config, planner.plan(40 * GB), planner)
    assert planner.asked and all(experiment.mesh_sizes(4) for experiment, _ in planner.asked)


def test_nothing_fits_and_the_smallest_is_named(config, base):
    planner = Planner(base, lambda experiment: (30 if experiment.model.remat == "full" else 40) * 2**30)
    found = advise(config, planner.plan(40 * GB), planner)
    assert found.changes is None
    assert "take more devices" in found.text() and "30 GiB" in found.text()


def test_estimates_are_scaled_by_what_the_compiler_found(config, base):
    """Formulas said 20 GB where the compiler needed 40: what they say fits must say half of it."""
    planner = Planner(base, lambda experiment: 20 * GB // experiment.train.accumulate, compiled_factor=0.5)
    start = dataclasses.replace(planner.plan(20 * GB), compiled=OutOfMemory(1.0, 40 * GB, "Used"))
    assert advise(config, start, planner, compile_at_most=0).changes == {"train.accumulate": 4}


def test_what_does_not_fit_when_compiled_is_not_advised(config, base):
    planner = Planner(base, lambda experiment: 12 * GB // experiment.train.accumulate, compiled_factor=3.0)
    start = dataclasses.replace(planner.plan(12 * GB), compiled=OutOfMemory(1.0, 18 * GB, "Used"))
    found = advise(config, start, planner, compile_at_most=2)
    compiled = [experiment.train.accumulate for experiment, compile_step in planner.asked if compile_step]
    assert compiled and len(compiled) <= 2
    assert found.compiled == len(compiled)


def test_the_chip_of_the_plan_is_the_limit(config):
    assert parse_topology("v5e:2x2").chip.hbm == 16 * 2**30
