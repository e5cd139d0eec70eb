"""A plan tells what the run then has: the bytes of real arrays, and the collectives of the real step."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
import re
import subprocess
import sys

import jax
import pytest
import tiny
from flax import nnx

from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.mesh import MESH_AXES, abstract_mesh, make_mesh
from sparse_lm.models.counts import count, dense_twin
from sparse_lm.optim.build import build_optimizer
from sparse_lm.planning.describe import binary, describe
from sparse_lm.planning.plan import (
    OutOfMemory,
    abstract_state,
    device_bytes,
    make_plan,
    needed_bytes,
    plan_here,
    plan_topology,
    resolve,
)
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.state import create_state

ROOT = pathlib.Path(__file__).resolve().parents[2]


def experiment(**changes):
    return resolve(tiny.experiment(model__dropout=0.0, **changes))


def mesh_for(config):
    return make_mesh(config.mesh_sizes(8), jax.devices()[:8])


def plan_of(config, compile_step=False):
    return make_plan(config, mesh_for(config), compile_step)


def shard_bytes(tree, device):
    """Bytes that a device really holds."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    shards = [shard for leaf in leaves for shard in leaf.addressable_shards if shard.device == device]
    return sum(shard.data.nbytes for shard in shards)


@pytest.fixture(scope="module")
def exchanging():
    """The compiled plan of tokens that move to their experts, and the experiment."""
    config = experiment(mesh__expert=4, mesh__fsdp=2, mesh__data=1, model__moe__dispatcher="all_to_all")
    return plan_of(config, compile_step=True), config


@pytest.fixture(scope="module")
def gathering():
    """The compiled plan of experts that are gathered."""
    return plan_of(experiment(mesh__expert=4, mesh__fsdp=2, mesh__data=1), compile_step=True)


def test_bytes_are_those_of_the_real_arrays():
    config = experiment(mesh__fsdp=2, mesh__expert=2, mesh__model=2, mesh__data=1)
    mesh, plan = mesh_for(config), plan_of(config)
    optimizer = build_optimizer(config.optim, config.train.steps)
    with jax.set_mesh(mesh):
        state = jax.jit(lambda key: create_state(key, config.model, optimizer, DEFAULT))(jax.random.key(0))
        abstract = abstract_state(config, mesh)
    parameters = nnx.split(state.model, nnx.Param, ...)[1]
    for device in mesh.devices.flat:
        assert shard_bytes(parameters, device) == plan.state.parameters
        assert shard_bytes(state.optimizer, device) == plan.state.optimizer
    assert device_bytes(state) == device_bytes(abstract) == shard_bytes(state, mesh.devices.flat[0])


def test_on_one_device_the_parameters_are_all_there():
    config = experiment()
    plan = make_plan(config, make_mesh({}, jax.devices()[:1]), compile_step=False)
    assert plan.state.parameters == count(config.model).parameter_bytes == 4 * sum(part.total for part in plan.parts)
    assert plan.state.gradients == plan.state.parameters
    # adamw: two moments, and a few counters.
    assert 0 <= plan.state.optimizer - 2 * plan.state.parameters <= 64


def test_experts_that_are_cut_leave_a_device_with_its_share():
    whole, cut = plan_of(experiment()), plan_of(experiment(mesh__expert=4))
    along_experts = sum(part.total for part in whole.parts if part.name in ("experts", "router"))
    assert whole.state.parameters - cut.state.parameters == 4 * along_experts * 3 // 4
    assert cut.state.optimizer < whole.state.optimizer


def test_fsdp_cuts_everything_with_a_model_axis():
    whole, cut = plan_of(experiment()), plan_of(experiment(mesh__fsdp=8, mesh__data=1))
    assert cut.state.parameters == whole.state.parameters / 8


def test_flops_and_parts_are_those_of_the_counts():
    config = experiment()
    plan, counts = plan_of(config), count(config.model)
    assert plan.tokens_per_step == 8 * 16
    assert plan.model_flops == 8 * 16 * counts.flops_per_token(16)
    assert sum(part.flops for part in plan.parts) == counts.flops_per_token(16)
    assert {part.name: part.active for part in plan.parts}["experts"] == counts.experts.active


def test_tokens_that_move_show_as_all_to_all(exchanging):
    plan, config = exchanging
    found = {collective.kind: collective for collective in plan.compiled.collectives}
    assert found["all-to-all"].axes == ("expert",)
    # One sparse layer: two exchanges forward, two backward.
    assert found["all-to-all"].count == 4 * sum(config.model.sparse) == 4
    # Each device has one group of 16 tokens: slots E x C x D of float32, with capacity 1.0 * 2 * 16 / 4.
    assert found["all-to-all"].bytes == 4 * (4 * 8 * 16 * 4)
    assert all(collective.exact for collective in plan.compiled.collectives)


def test_experts_that_are_gathered_need_no_all_to_all(gathering, exchanging):
    def gathers(plan):
        return sum(one.count for one in plan.collectives if one.kind == "all-gather" and "expert" in one.axes)

    assert "all-to-all" not in {one.kind for one in gathering.collectives}
    assert gathers(gathering) > gathers(exchanging[0])


def test_the_executed_flops_are_the_models_but_for_what_is_left_empty(exchanging):
    """Without remat and with every expert's slots full, each product of the model is computed once."""
    plan, config = exchanging
    assert config.model.moe.capacity_factor == 1 and config.model.remat == "none"
    assert plan.overhead == pytest.approx(1, abs=0.02)
    assert plan.step.work.exact


def test_the_estimate_agrees_where_it_can_be_exact(exchanging):
    plan, _ = exchanging
    estimated = {(one.kind, one.axes): one.bytes for one in plan.estimate.collectives}
    [exchanged] = [one for one in plan.collectives if one.kind == "all-to-all"]
    assert estimated["all-to-all", ("expert",)] == exchanged.bytes
    assert plan.estimate.flops == pytest.approx(plan.flops, rel=0.02)


def test_arguments_are_the_state_and_the_batch(exchanging):
    plan, config = exchanging
    with jax.set_mesh(mesh_for(config)):
        state = device_bytes(abstract_state(config, mesh_for(config)))
    step = plan.compiled
    batch = 5 * 4 * (8 * 17) // 8
    assert step.aliased == state  # donated: the new state takes its place
    assert step.arguments == state + batch  # without dropout and jitter the key is left out
    assert step.peak == step.total == step.arguments + step.outputs - step.aliased + step.temporaries
    assert dataclasses.replace(step, assigned=step.total - 1).peak == step.total - 1
    assert step.temporaries > 0
    assert step.seconds > 0
    assert step.largest[0].bytes >= step.largest[-1].bytes > 0
    assert plan.peak == step.peak
    assert (plan.source, plan.fits, plan.roofline) == ("compiled", None, None)  # nothing is known of this processor


def test_without_compiling_there_is_nothing_of_it():
    config = experiment()
    plan = plan_of(config)
    assert plan.compiled is None
    assert "estimated, not compiled" in describe(plan, config)
    assert (plan.source, plan.peak) == ("estimated", plan.estimated_peak)
    assert plan.to_json()["compiled"] is None


def test_the_json_has_every_number(exchanging):
    plan, _ = exchanging
    back = json.loads(json.dumps(plan.to_json()))
    assert back["mesh"] == {"replica": 1, "stage": 1, "data": 1, "fsdp": 2, "expert": 4, "context": 1, "model": 1}
    assert back["state"] == dataclasses.asdict(plan.state)
    assert back["parts"] == [dataclasses.asdict(part) for part in plan.parts]
    assert (back["peak"], back["source"]) == (plan.compiled.peak, "compiled")
    assert back["compiled"] == json.loads(json.dumps(dataclasses.asdict(plan.compiled)))
    assert back["model_flops"] == plan.model_flops


def test_the_text_says_what_matters(exchanging, gathering):
    text = describe(*exchanging)
    assert "fsdp=2 x expert=4" in text
    assert f"{count(exchanging[1].model).total:,}" in text
    assert re.search(rf"all-to-all +expert +4 x +{binary(8192)}$", text, re.M)
    assert re.search(r"executed: .* loops by their iterations\), 1\.0\d\d of the model's", text)
    assert "(at least)" not in text
    assert "all-to-all" not in describe(gathering, exchanging[1])


def test_the_largest_arrays_are_listed_when_asked_for(exchanging):
    plan, config = exchanging
    first = plan.compiled.largest[0]
    assert first.source not in describe(plan, config)
    text = describe(plan, config, largest=1)
    assert f"{first.type}" in text and text.endswith(first.source)


def test_what_is_not_known_is_marked(exchanging):
    plan, config = exchanging
    unsure = tuple(dataclasses.replace(collective, exact=False) for collective in plan.compiled.collectives)
    text = describe(dataclasses.replace(plan, compiled=dataclasses.replace(plan.compiled, collectives=unsure)), config)
    assert "loop of unknown length, counted as one iteration" in text
    alone = describe(dataclasses.replace(plan, compiled=dataclasses.replace(plan.compiled, collectives=())), config)
    assert "collectives: none" in alone


def test_a_dense_model_has_a_plan_too():
    config = experiment()
    dense = config.replace(model=dense_twin(config.model))
    plan = plan_of(dense)
    assert {part.name: part.total for part in plan.parts}["experts"] == 0
    assert plan.state.parameters < plan_of(config).state.parameters


@pytest.mark.parametrize(("source", "size"), [("grammar", 8), ("stdlib", 264)])
def test_the_vocabulary_is_known_without_the_data(source, size):
    assert resolve(tiny.experiment(data__source=source)).model.vocab_size == size


def test_text_is_not_read(tmp_path):
    config = tiny.experiment().replace(data=DataConfig(source="text", path=str(tmp_path / "absent"), length=16))
    assert resolve(config).model.max_length == 16


def test_a_vocabulary_that_is_too_small_is_refused():
    with pytest.raises(ConfigError, match=r"model.vocab_size=4: the data have 8 tokens"):
        resolve(tiny.experiment(model__vocab_size=4))


def test_a_mesh_that_does_not_fit_is_refused():
    config = experiment(mesh__expert=4)
    with pytest.raises(ConfigError, match="mesh"):
        make_plan(config.replace(mesh__data=1), make_mesh({}, jax.devices()[:1]), compile_step=False)


class Refusing:
    """A traced step whose compiler has only this to say."""

    def __init__(self, message):
        self.message = message

    def lower(self):
        return self

    def compile(self):
        raise jax.errors.JaxRuntimeError(self.message)


def test_a_compiler_that_gives_up_is_understood_or_heard(monkeypatch):
    def answer(message):
        monkeypatch.setattr("sparse_lm.planning.plan.trace_step", lambda *_: Refusing(message))
        return make_plan(experiment(), make_mesh({}, jax.devices()[:1]))

    large = answer("RESOURCE_EXHAUSTED: Used 2.0G of 1.0G hbm")
    assert isinstance(large.compiled, OutOfMemory) and large.peak == 2 * 2**30 and large.fits is False
    with pytest.raises(
        ConfigError, match=r"model.moe.dispatcher='ragged_all_to_all'.*use all_to_all, or another slice"
    ):
        answer("INTERNAL: Ragged all-to-all is currently not supported in limited ICI routing settings")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        answer("INTERNAL: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="vmem"):  # a kernel's tiles, not the step
        answer("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem while allocating on stack")


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", int(20.5 * 2**30)),
        ("RESOURCE_EXHAUSTED: ... Used 512.0K of 16.0K smem", 512 * 1024),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (21.21G) "
            "exceeds available HBM (15.75G).",
            int(21.21 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: something else", None),
    ],
)
def test_what_a_compiler_says_it_needs(message, needed):
    assert needed_bytes(message) == needed


def test_a_mesh_of_no_devices_can_be_planned_but_for_compiling():
    config = experiment(mesh__fsdp=2, mesh__expert=4, mesh__data=1)
    mesh = abstract_mesh(dict(zip(MESH_AXES, (1, 1, 1, 2, 4, 1, 1), strict=True)))
    abstract, real = make_plan(config, mesh, compile_step=False), plan_here(config, compile_step=False)
    assert (abstract.state, abstract.estimate, abstract.mesh) == (real.state, real.estimate, real.mesh)


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (3 << 30, "3 GiB")])
def test_bytes_as_a_person_reads_them(size, text):
    assert binary(size) == text
    assert binary(1 << 60).endswith("TiB")


def main(*arguments):
    command = [sys.executable, str(ROOT / "experiments/plan.py"), f"--config={ROOT}/configs/quickstart.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_main_writes_what_it_prints(tmp_path):
    file = tmp_path / "plan.json"
    done = main("--config.mesh.expert=4", "--devices=8", "--nocompile", f"--json={file}")
    assert done.returncode == 0, done.stderr
    written = json.loads(file.read_text())
    assert written["config"]["mesh"]["expert"] == 4
    assert math.prod(written["mesh"].values()) == 8
    assert binary(written["state"]["parameters"]) in done.stdout
    assert f"{written['model_flops']:.4g}" in done.stdout


def test_the_main_refuses_in_one_line():
    done = main("--config.mesh.expert=3", "--devices=8", "--nocompile")
    assert done.returncode == 2
    assert done.stderr.startswith("error: config.mesh")
    assert "Traceback" not in done.stderr


def test_without_the_tpu_compiler_there_is_an_estimate_and_the_way_to_one(monkeypatch):
    config = experiment(mesh__expert=4)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plan = plan_topology(config, "v5e:2x4")
    assert (plan.source, plan.step, plan.fits) == ("estimated", None, True)
    assert "pip install 'sparse_lm[tpu-plan]'" in describe(plan, config)
    assert plan_topology(config, "v5e:2x4", compile_step=False).compiled is None


def test_an_experiment_that_does_not_fit_a_slice_is_refused():
    with pytest.raises(ConfigError, match="mesh"):
        plan_topology(experiment(mesh__expert=4, mesh__data=1), "v5e:2x4", compile_step=False)
