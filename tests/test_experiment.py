"""What the root of the configuration refuses, and that what it accepts can be built and lowered."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tiny

from sparse_lm.batch import Batch
from sparse_lm.config import ConfigError, from_dict, to_config_dict, to_dict
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment, load_experiment, resolved
from sparse_lm.mesh import make_mesh
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.attention.switch_head import SwitchHead
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.build import build_optimizer
from sparse_lm.optim.config import OptimConfig
from sparse_lm.sharding import DEFAULT, put
from sparse_lm.train.config import MeshConfig, TrainConfig
from sparse_lm.train.state import create_state
from sparse_lm.train.step import make_train_step

VOCAB = 12


def refused(key, value, way_out, action):
    with pytest.raises(ConfigError) as caught:
        action()
    assert (caught.value.key, caught.value.value) == (key, value)
    assert way_out in caught.value.why


def test_learned_positions_need_a_table_as_long_as_a_row():
    learned = {"model__position": "learned"}
    refused("model.max_length", 8, "at least data.length=16", lambda: tiny.experiment(**learned, model__max_length=8))
    assert tiny.experiment(**learned, model__max_length=16).model.max_length == 16
    assert tiny.experiment(model__max_length=8).model.max_length == 8  # rope has no table
    assert resolved(tiny.experiment(**learned), VOCAB).model.max_length == 16


@pytest.mark.parametrize("priority", ["first_choice", "probability"])
def test_routing_that_looks_ahead_is_refused(priority):
    choice = {"model__moe__priority": priority}
    refused("model.moe.priority", priority, "allow_non_causal=True", lambda: tiny.experiment(**choice))
    tiny.experiment(**choice, model__moe__allow_non_causal=True)
    tiny.experiment(**choice, model__moe__capacity_factor=None, model__moe__capacity_factor_eval=None)


@pytest.mark.parametrize("size", [3, 5, 24, 40])
def test_groups_that_do_not_tile_the_rows_are_refused(size):
    refused("model.moe.group_size", size, "data.length=16", lambda: tiny.experiment(model__moe__group_size=size))


@pytest.mark.parametrize("size", [1, 4, 8, 16, 32, 128, None])
def test_groups_that_tile_the_rows_pass(size):
    assert tiny.experiment(model__moe__group_size=size).mesh_sizes(1)["data"] == 1


@pytest.mark.parametrize(
    ("mesh", "devices", "expected"),
    [
        ({}, 1, (1, 1, 1, 1)),
        ({}, 8, (8, 1, 1, 1)),
        ({"expert": 4}, 8, (2, 1, 4, 1)),
        ({"data": 2, "fsdp": -1, "model": 2}, 8, (2, 2, 1, 2)),
        ({"data": 1, "expert": 2, "model": 4}, 8, (1, 1, 2, 4)),
        ({"data": 1, "expert": 8}, 8, (1, 1, 8, 1)),  # four experts, whose hidden width is cut instead
    ],
)
def test_mesh_sizes(mesh, devices, expected):
    sizes = tiny.experiment(model__vocab_size=VOCAB, mesh=MeshConfig(**mesh)).mesh_sizes(devices)
    named = dict(zip(("data", "fsdp", "expert", "model"), expected, strict=True))
    assert sizes == {"replica": 1, "stage": 1, "context": 1, **named}


@pytest.mark.parametrize(
    ("mesh", "devices", "words"),
    [
        ({"expert": 3}, 8, "no whole number for mesh.data on 8 devices"),
        ({"data": 2}, 8, "--devices=N"),
        ({"data": 1, "expert": 4}, 1, "needs 4 devices and there are 1"),
        ({"data": 0}, 8, "mesh.data=0"),
        ({"fsdp": -1}, 8, "only one axis may be -1"),
        ({"fsdp": -2}, 8, "mesh.fsdp=-2"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(mesh, devices, words):
    config = MeshConfig(**mesh)
    refused("mesh", to_dict(config), words, lambda: tiny.experiment(mesh=config).mesh_sizes(devices))


@pytest.mark.parametrize(
    ("changes", "key", "axis"),
    [
        ({"model__num_heads": 2, "model__num_kv_heads": 2}, "model.num_heads", "model"),
        ({"model__num_kv_heads": 2}, "model.num_kv_heads", "model"),
        ({"model__d_ff": 18}, "model.d_ff", "model"),
        ({"model__vocab_size": 10}, "model.vocab_size", "model"),
        ({"model__moe__d_expert": 6}, "model.moe.d_expert", "model"),
        ({"model__moe__num_experts": 6, "model__moe__d_expert": 6}, "model.moe.num_experts", "expert"),
        ({"model__attention": SwitchHead(num_experts=6)}, "model.attention.num_experts", "expert"),
        ({"model__d_model": 18, "model__num_heads": 1, "model__head_dim": 4}, "model.d_model", "fsdp"),
        ({"data__length": 18, "model__moe__group_size": 9}, "data.length", "context"),
    ],
)
def test_a_model_that_does_not_fit_the_mesh_is_refused(changes, key, axis):
    config = tiny.experiment(**changes, mesh=MeshConfig(**{"data": -1, axis: 4}), train__batch_size=16)
    value = config
    for part in key.split("."):
        value = getattr(value, part)
    refused(key, value, f"multiple of mesh.{axis}=4", lambda: config.mesh_sizes(8))
    assert config.mesh_sizes(4) | {axis: 1} if axis == "none" else config.replace(mesh=MeshConfig()).mesh_sizes(8)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    config = tiny.experiment(train__batch_size=12)
    refused("train.batch_size", 12, "multiple of 8", lambda: config.mesh_sizes(8))
    assert config.mesh_sizes(4)["data"] == 4
    cut = tiny.experiment(train__batch_size=16, train__accumulate=4)
    refused("train.batch_size", 16, "multiple of 32", lambda: cut.mesh_sizes(8))
    assert cut.replace(mesh=MeshConfig(model=4)).mesh_sizes(4)["model"] == 4  # tensor parallelism shares no batch


STAGES = {"mesh": MeshConfig(data=1, stage=2), "model__num_layers": 4, "train__accumulate": 2}


@pytest.mark.parametrize(
    ("changes", "key", "value", "words"),
    [
        ({"model__num_layers": 6}, "model.num_layers", 6, "has 3 units of 2 equal layers each, 0 layers aside"),
        ({"model__num_layers": 1, "model__moe": None}, "model.num_layers", 1, "choose 2 layers, or another mesh.stage"),
        ({"train__accumulate": 1}, "train.accumulate", 1, "multiple of mesh.stage=2"),
        ({"train__accumulate": 4, "train__pipeline_microbatches": 1}, "train.pipeline_microbatches", 1, "mesh.stage=2"),
    ],
)
def test_what_stages_cannot_share_is_refused(changes, key, value, words):
    config = tiny.experiment(**(STAGES | changes))
    refused(key, value, words, lambda: config.mesh_sizes(2))
    assert config.replace(mesh=MeshConfig()).mesh_sizes(2)["stage"] == 1


def test_layers_of_other_kinds_stand_outside_of_the_stages():
    layers = {"model__num_layers": 7, "model__moe__first_dense": 3, "model__moe__every": 1}
    config = tiny.experiment(**(STAGES | layers))
    assert config.mesh_sizes(2)["stage"] == 2


def test_groups_are_shared_by_the_devices_along_a_row_too():
    config = tiny.experiment(train__batch_size=4, mesh=MeshConfig(data=2, context=4))  # a group is a row
    refused("model.moe.group_size", 16, "into 4 groups, not whole for 8 devices", lambda: config.mesh_sizes(8))
    assert config.replace(model__moe__group_size=4).mesh_sizes(8)["context"] == 4


def test_groups_over_rows_must_be_whole_on_every_device():
    config = tiny.experiment(model__moe__group_size=32)
    assert config.mesh_sizes(4)["data"] == 4  # 8 rows of 16 are 4 groups
    refused("model.moe.group_size", 32, "4 groups, not whole for 8 devices", lambda: config.mesh_sizes(8))
    refused(
        "model.moe.group_size", 256, "0.5 groups", lambda: tiny.experiment(model__moe__group_size=256).mesh_sizes(1)
    )


def test_resolved_fills_in_what_the_data_know():
    config = resolved(tiny.experiment(), VOCAB)
    assert (config.model.vocab_size, config.model.max_length) == (VOCAB, 16)
    assert resolved(config, VOCAB) == config
    roomy = tiny.experiment(model__vocab_size=64, model__max_length=99)
    assert (resolved(roomy, VOCAB).model.vocab_size, resolved(roomy, VOCAB).model.max_length) == (64, 99)
    refused("model.vocab_size", 11, "12 tokens", lambda: resolved(tiny.experiment(model__vocab_size=11), VOCAB))


def test_the_experiment_survives_dictionaries():
    config = tiny.experiment(data_seed=3)
    assert from_dict(Experiment, to_dict(config)) == config
    assert from_dict(Experiment, to_config_dict(config)) == config


def drawn(draw, name, *choices):
    return draw(st.sampled_from(choices), label=name)


@st.composite
def configurations(draw):
    """Nested values with many of the contradictions that a person would write."""
    moe = None
    if drawn(draw, "sparse", True, True, True, False):
        moe = {
            "num_experts": drawn(draw, "num_experts", 4, 4, 8, 8, 6, 1),
            "top_k": drawn(draw, "top_k", 1, 2, 4),
            "d_expert": drawn(draw, "d_expert", 8, 4, None, 3),
            "num_shared": drawn(draw, "num_shared", 0, 1),
            "every": drawn(draw, "every", 1, 2),
            "group_size": drawn(draw, "group_size", None, 4, 16, 32),
            "capacity_factor": drawn(draw, "capacity_factor", None, 0.5, 1.25),
            "priority": drawn(draw, "priority", "token", "token", "first_choice", "probability"),
            "allow_non_causal": drawn(draw, "allow_non_causal", True, True, False),
            "dispatcher": drawn(draw, "dispatcher", "dense", "einsum", "gather", "all_to_all"),
            "router": TopK(
                renormalise=drawn(draw, "renormalise", "none", "none", "before_drop", "after_drop"),
                second_expert=drawn(draw, "second_expert", "all", "all", "all", "gshard"),
                jitter=drawn(draw, "jitter", 0.0, 0.1),
            ),
        }
    model = {
        "num_layers": drawn(draw, "num_layers", 1, 2, 3),
        "d_model": drawn(draw, "d_model", 16, 16, 12),
        "num_heads": drawn(draw, "num_heads", 4, 4, 2, 1),
        "num_kv_heads": drawn(draw, "num_kv_heads", None, 2, 1),
        "d_ff": drawn(draw, "d_ff", 16, 16, 6),
        "position": drawn(draw, "position", "rope", "learned", "sinusoidal", "none"),
        "norm_position": drawn(draw, "norm_position", "pre", "post"),
        "activation": drawn(draw, "activation", "swiglu", "gelu"),
        "dropout": drawn(draw, "dropout", 0.0, 0.1),
        "scan_layers": drawn(draw, "scan_layers", True, False),
        "remat": drawn(draw, "remat", "none", "full", "dots"),
        "tie_embeddings": drawn(draw, "tie_embeddings", True, False),
        "dtype": drawn(draw, "dtype", "float32", "bfloat16"),
    }
    train = {"batch_size": drawn(draw, "batch_size", 16, 16, 4), "accumulate": drawn(draw, "accumulate", 1, 2)}
    mesh = {axis: drawn(draw, axis, 1, 1, 2) for axis in ("fsdp", "expert", "model")}
    return moe, model, train, mesh, drawn(draw, "optimizer", "adamw", "adafactor", "lion")


def lower(config: Experiment) -> None:
    """Traces a whole training step on eight devices, from the configuration alone."""
    config = resolved(config, VOCAB)
    mesh = make_mesh(config.mesh_sizes(8))
    optimizer = build_optimizer(config.optim, 10)
    step = make_train_step(optimizer, config.train.accumulate, 2)
    with jax.set_mesh(mesh):
        tokens = put(mesh, DEFAULT, np.zeros((config.train.batch_size, 17), np.int32), "B.")
        state = jax.eval_shape(lambda key: create_state(key, config.model, optimizer, DEFAULT), jax.random.key(0))
        new, metrics = jax.eval_shape(step, state, Batch(tokens, tokens, tokens, tokens, tokens), jax.random.key(0))
    assert metrics.total.shape == ()
    assert [typed(leaf) for leaf in jax.tree.leaves(new)] == [typed(leaf) for leaf in jax.tree.leaves(state)]


def typed(leaf):
    cuts = () if leaf.sharding is None else [axes for axes in leaf.sharding.spec if axes is not None]
    return leaf.shape, leaf.dtype, tuple(cuts)


def test_a_configuration_runs_or_is_refused():
    ran = []

    @hypothesis.settings(max_examples=40, phases=[hypothesis.Phase.generate])
    @hypothesis.given(configurations())
    def check(values):
        moe, model, train, mesh, optimizer = values
        try:
            config = Experiment(
                model=ModelConfig(**model, moe=None if moe is None else MoEConfig(**moe)),
                data=DataConfig(source="grammar", length=16),
                train=TrainConfig(**train),
                mesh=MeshConfig(**mesh),
                optim=OptimConfig(name=optimizer),
            )
            resolved(config, VOCAB).mesh_sizes(8)
        except ConfigError:
            ran.append(False)
            return
        ran.append(True)
        lower(config)

    check()
    assert ran.count(True) >= 8 and ran.count(False) >= 8


def test_factored_statistics_of_cut_parameters_lower():
    wide = {"model__d_model": 128, "model__d_ff": 256, "model__moe__d_expert": 128, "model__vocab_size": 12}
    lower(tiny.experiment(**wide, optim__name="adafactor", mesh=MeshConfig(fsdp=2, expert=2, model=2)))


def test_a_file_of_configs_is_an_experiment():
    file = Path(__file__).resolve().parents[1] / "configs" / "quickstart.py"
    sparse, dense = load_experiment(file), load_experiment(str(file), "dense")
    assert sparse.model.moe is not None and sparse.model.moe.top_k == 4
    assert dense.model.moe is None and dense.data == sparse.data and dense.train == sparse.train
    with pytest.raises(ValueError, match="the variants are sparse and dense"):
        load_experiment(file, "moist")


@pytest.mark.parametrize(("content", "words"), [(None, "is no Python file"), ("x = 1", "defines no get_config")])
def test_a_file_without_an_experiment_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ConfigError, match=rf"mine\.py.*{words}"):
        load_experiment(tmp_path / "mine.py")
