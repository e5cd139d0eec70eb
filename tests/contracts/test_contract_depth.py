"""Models whose tokens skip layers: the same on every mesh, however cut and compiled; causality; nothing is lost."""

from __future__ import annotations

import functools
from typing import Any

import cases
import decoders
import numpy as np
import pytest
from decoders import causal_moe, decoder_config
from test_contract_model import assert_same

from sparse_lm.batch import Batch
from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import DepthConfig, ModelConfig
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.optim.config import OptimConfig
from sparse_lm.train.config import TrainConfig

PREDICTORS = ("router", "mlp")


def config(predictor: str = "mlp", scope: str = "global", **options: Any) -> ModelConfig:
    """Two sparse layers; only half of a row's tokens pass the second one."""
    depth = DepthConfig(capacity=0.5, predictor=predictor, hidden=4, weight=0.5)  # type: ignore[arg-type]
    return decoder_config(**{"moe": causal_moe(scope=scope), "depth": depth, **options})


def assert_accounted(flat: dict[str, np.ndarray], wrapped: int):
    """Every token passed, skipped or was padding, in every wrapped layer; the experts inside saw those that passed."""
    get = {name.split("/depth/")[1]: value for name, value in flat.items() if "/depth/" in name}
    assert get["processed"].shape == (wrapped,)
    np.testing.assert_array_equal(get["processed"], get["chosen"])  # in training
    np.testing.assert_array_equal(get["processed"] + get["skipped"] + get["padding"], decoders.ROWS * decoders.LENGTH)
    real_B = (decoders.host_batch().segments_BL[:, :-1] > 0).sum(axis=1)
    np.testing.assert_array_equal(get["processed"], np.minimum(real_B, decoders.LENGTH // 2).sum())
    assert np.all((get["agreed"] > 0) & (get["agreed"] < real_B.sum()))


@functools.cache
def reference(predictor: str):
    return decoders.train(config(predictor), None)[0]


@pytest.mark.parametrize(
    "sizes",
    [pytest.param(name, marks=() if name == "fsdp2-expert2-model2" else pytest.mark.slow) for name in cases.MESHES],
)
def test_training_is_the_same_on_every_mesh(sizes, mesh_of):
    (got,) = decoders.train(config(), mesh_of(**cases.MESHES[sizes]))
    assert_same(got.metrics, reference("mlp").metrics)
    assert_same(got.state, reference("mlp").state)
    assert_accounted(got.metrics, 1)


@pytest.mark.slow
def test_accumulation_on_a_mesh(mesh_of):
    (got,) = decoders.train(config("router"), mesh_of(fsdp=2, expert=2, model=2), accumulate=2)
    assert_same(got.metrics, reference("router").metrics)
    assert_same(got.state, reference("router").state)


def test_the_mesh_comparison_sees_every_gradient():
    trace = {name: value for name, value in reference("mlp").state.items() if "trace" in name}
    names = {name.removesuffix("/value").rsplit("/", 1)[-1] for name in trace}
    assert names >= {"weight_D", "up_DF", "bias_F", "down_F", "weight_DE", "query_DHI"}
    assert all(np.abs(value).max() > 0 for value in trace.values())


@functools.cache
def whole_batch(predictor: str, scope: str):
    return decoders.gradients(config(predictor, scope))


@pytest.mark.parametrize(
    ("predictor", "scope", "number"),
    [("router", "sequence", 2), pytest.param("mlp", "global", 4, marks=pytest.mark.slow)],
)
def test_microbatches_add_up_to_the_batch(predictor, scope, number):
    got = decoders.gradients(config(predictor, scope), number)
    assert_same(got, whole_batch(predictor, scope))
    assert_accounted(got, 1)
    routed = got["parts/stats/router/tokens_U"].sum(-1)
    assert routed[1] == got["parts/depth/processed"][0] < routed[0]


def test_the_loss_is_the_sum_of_its_parts():
    got, moe = whole_batch("router", "global"), causal_moe()
    tokens = (decoders.host_batch().segments_BL[:, :-1] > 0).sum()
    expected = got["parts/loss"] + moe.balance.load * got["parts/load_balance_N"].sum()
    expected = expected + moe.balance.z * got["parts/z_N"].sum() + 0.5 * got["parts/depth/loss"].sum() / tokens
    np.testing.assert_allclose(got["total"], expected, rtol=1e-6)
    # A loss per routed token: that of the wrapped layer is no smaller for having fewer of them.
    assert np.all((got["parts/load_balance_N"] > 0.9) & (got["parts/load_balance_N"] < 3))


@functools.cache
def layered(remat: str = "none", scan_layers: bool = True):
    """dense, wrapped, sparse, wrapped, sparse: one layer and two repeats of a unit."""
    depth = DepthConfig(capacity=0.5, every=2, weight=0.5)
    moe = causal_moe(every=2, first_dense=1)
    return decoders.gradients(decoder_config(moe, num_layers=5, depth=depth, remat=remat, scan_layers=scan_layers))


@pytest.mark.parametrize(
    ("remat", "scan_layers"),
    [
        pytest.param("none", False, marks=pytest.mark.slow),
        ("full", True),
        pytest.param("dots", True, marks=pytest.mark.slow),
    ],
)
def test_scan_and_remat_change_nothing(remat, scan_layers):
    got = layered(remat, scan_layers)
    assert_same(got, layered())
    assert_accounted(got, 2)
    assert got["parts/stats/dispatch/kept"].shape == (2,)


def test_rows_of_padding_change_nothing():
    batch = decoders.host_batch()
    more: dict[str, Any] = {
        name: np.concatenate([x, np.zeros((4, x.shape[1]), x.dtype)]) for name, x in vars(batch).items()
    }
    got = decoders.gradients(config("router", "sequence"), batch=Batch(**more))
    kept, expected = (
        {name: value for name, value in x.items() if "padding" not in name}
        for x in (got, whole_batch("router", "sequence"))
    )
    assert_same(kept, expected)


@pytest.mark.parametrize(
    ("num_layers", "first_dense", "every"), [pytest.param(4, 0, 2, marks=pytest.mark.slow), (5, 1, 3)]
)
def test_the_state_of_every_router_follows_the_statistics_of_its_own_layer(num_layers, first_dense, every):
    """Four sparse layers, one or two of them wrapped: a bias moves down where the load of its own layer is high.

    Two repeats of a unit of two; or a dense layer, a unit of three and a layer that is left over.
    """
    moe = causal_moe(first_dense=first_dense).replace(router=Sigmoid(bias_rate=0.5))
    (got,) = decoders.train(config(num_layers=num_layers).replace(moe=moe, depth__every=every), None, steps=1)
    load_NE = got.metrics["parts/stats/router/load_UE"].sum(axis=1)
    bias = [value for name, value in sorted(got.state.items()) if "bias_E" in name and "trace" not in name]
    assert [leaf.shape for leaf in bias] == ([(2, 8)] * 2 if every == 2 else [(1, 8)] * 4)
    bias_NE = np.stack(bias, axis=1).reshape(4, 8)  # the layers of a unit are neighbours
    expected_NE = 0.5 * np.sign(load_NE.mean(axis=1, keepdims=True) - load_NE)
    np.testing.assert_allclose(bias_NE, expected_NE)
    assert len({tuple(row) for row in expected_NE}) == 4


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_training_sees_later_tokens_and_evaluation_does_not(predictor):
    model = config(predictor)
    assert decoders.earlier_changes(model, training=True) > 1000
    assert decoders.earlier_changes(model, training=False) == 0


def test_documents_do_not_see_each_other_in_evaluation():
    # Experts drop tokens of both documents alike, and so would let one see the other: a dense model.
    logits, batch = decoders.forward(config(moe=None), training=False), decoders.host_batch()
    arrays = [x[:, :-1] for x in (batch.tokens_BL, batch.segments_BL, batch.positions_BL)]
    before = logits(*arrays)
    other = np.where(arrays[1] == 1, (arrays[0] + 1) % decoders.VOCAB, arrays[0])
    after = logits(other, *arrays[1:])
    np.testing.assert_array_equal(after[arrays[1] == 2], before[arrays[1] == 2])
    assert np.any(after[arrays[1] == 1] != before[arrays[1] == 1])


def test_the_leak_of_training_has_to_be_accepted():
    model = ModelConfig(num_layers=2, depth=DepthConfig())
    parts = {"data": DataConfig(length=16), "optim": OptimConfig(warmup_steps=2), "train": TrainConfig(steps=10)}
    with pytest.raises(ConfigError, match=r"model\.depth\.allow_non_causal=False.*later tokens.*depth=None"):
        Experiment(model=model, **parts)
    accepted = Experiment(model=model.replace(depth__allow_non_causal=True, depth__predictor="mlp"), **parts)
    assert accepted.mesh_sizes(1)["data"] == 1
    odd = accepted.replace(model__depth__hidden=7, mesh__model=2, mesh__data=1)
    with pytest.raises(ConfigError, match=r"model\.depth\.hidden=7.*mesh\.model=2"):
        odd.mesh_sizes(2)
