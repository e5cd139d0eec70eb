"""configs/routers.py: every variant resolves, runs a step at reduced size, and costs what its dense twin costs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import pytest

from sparse_lm.batch import Batch
from sparse_lm.config import from_dict, python_file
from sparse_lm.experiment import Experiment
from sparse_lm.models.counts import count
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.routers import ROUTERS
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.accumulate import loss_and_gradients

PATH = Path(__file__).parents[2] / "configs" / "routers.py"
LOADED = python_file(PATH)
assert LOADED is not None
MODULE: ModuleType = LOADED
VARIANTS = [*MODULE.layers()]


def experiment(variant: str) -> Experiment:
    return from_dict(Experiment, MODULE.get_config(variant))


def test_every_kind_has_a_variant():
    assert {layer.router.kind for layer in MODULE.layers().values()} == set(ROUTERS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_traces_at_reduced_size(variant):
    whole = experiment(variant)
    small = whole.replace(model__num_layers=2, model__d_model=16, model__num_heads=2, model__d_ff=64)
    config = small.model.replace(vocab_size=32)
    ones = jnp.ones((8, whole.data.length + 1), jnp.int32)
    batch = Batch(ones, ones, ones, ones, 0 * ones)

    def step(key):
        return loss_and_gradients(Decoder(key, config, DEFAULT), batch, key, 1, 1)

    total, parts, _ = jax.eval_shape(step, jax.random.key(0))
    assert total.shape == () and total.dtype == jnp.float32
    assert parts.stats is not None


@pytest.mark.parametrize("variant", VARIANTS)
def test_routed_experts_cost_what_a_dense_layer_costs(variant):
    model = experiment(variant).model.replace(vocab_size=264)
    costs, dense = count(model), count(model.replace(moe=None))
    assert costs.experts.multiplied + costs.dense.multiplied == dense.dense.multiplied


def test_balanced_hashing_knows_the_data():
    moe = experiment("hash_balanced").model.moe
    assert moe is not None
    router = moe.router
    assert isinstance(router, Hash) and router.mode == "balanced" and sum(router.frequencies) > 1e6


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match=r"nosuch.*switch.*hash_balanced.*dense"):
        MODULE.get_config("nosuch")
