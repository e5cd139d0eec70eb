"""Models whose attention has experts: the same on every mesh and however a batch is cut; causal and accounted for."""

from __future__ import annotations

import functools

import cases
import decoders
import jax
import numpy as np
import pytest
from decoders import causal_moe, decoder_config
from harness import deviation

from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.attention import AttentionExperts
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.attention.switch_head import SwitchHead
from sparse_lm.moe.config import BalanceConfig
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.moe.routers.top_k import TopK

TOLERANCE = 1e-5
BALANCE = BalanceConfig(load=0.1, z=0.01)
# The experts of the feed-forward part are 8 everywhere: their statistics and these cannot be mistaken for each other.
FORMS: dict[str, AttentionExperts] = {
    "mixture": Mixture(num_experts=4, router=TopK(gate="softmax_after", init_scale=4.0), balance=BALANCE),
    "mixture_state": Mixture(num_experts=4, router=Sigmoid(init_scale=4.0, bias_rate=0.1), balance=BALANCE),
    "switch_head": SwitchHead(num_experts=4, balance=BALANCE, router_scale=4.0),
}
CHOICES = {"mixture": 2, "mixture_state": 2, "switch_head": 2 * 4 * 2}  # per token: both sides of 4 heads, 2 each


def config_of(form: str, sparse: bool = True, **options) -> ModelConfig:
    kv_heads = 4 if form == "switch_head" else 2
    moe = causal_moe(every=2) if sparse else None  # the second layer; attention experts are in both
    return decoder_config(moe, attention=FORMS[form], num_kv_heads=kv_heads, **options)


def assert_same(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if np.issubdtype(value.dtype, np.floating):
            assert deviation(got[name], value) < TOLERANCE, name
        else:
            np.testing.assert_array_equal(got[name], value, err_msg=name)


def assert_accounted(flat: dict[str, np.ndarray], form: str):
    """Nothing is dropped or lost in the attention of any layer."""
    get = {name.split("/attention/stats/")[1]: value for name, value in flat.items() if "/attention/stats/" in name}
    real, padding = get["router/tokens_U"].sum(-1), get["router/padding_U"].sum(-1)
    np.testing.assert_array_equal(real + padding, [decoders.ROWS * decoders.LENGTH] * 2)
    np.testing.assert_array_equal(get["dispatch/kept"] + get["router/declined_U"].sum(-1), CHOICES[form] * real)
    np.testing.assert_array_equal(get["router/load_UE"].sum((1, 2)), get["dispatch/kept"])
    assert np.all(get["dispatch/dropped"] == 0)


@functools.cache
def reference(form: str):
    return decoders.train(config_of(form), None)[0]


@pytest.mark.parametrize(
    ("form", "sizes"),
    [
        pytest.param(
            form, sizes, marks=() if (form, sizes) == ("mixture", "fsdp2-expert2-model2") else pytest.mark.slow
        )
        for form in ("mixture", "switch_head")
        for sizes in cases.MESHES
    ]
    + [("mixture_state", "fsdp2-expert2-model2")],
)
def test_training_is_the_same_on_every_mesh(form, sizes, mesh_of):
    if "expert8" in sizes:  # E = 4 cannot be cut eightfold: the configuration refuses it, see below
        form_config = config_of(form).replace(attention__num_experts=8)
        expected = decoders.train(form_config, None)[0]
    else:
        form_config, expected = config_of(form), reference(form)
    (got,) = decoders.train(form_config, mesh_of(**cases.MESHES[sizes]))
    assert_same(got.metrics, expected.metrics)
    assert_same(got.state, expected.state)
    assert_accounted(got.metrics, form)


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_learns_and_the_parts_add_up_to_the_total(form):
    trajectory = reference(form)
    traces = {name: value for name, value in trajectory.state.items() if "trace" in name and "/attention/" in name}
    assert len(traces) == 2 * (6 if form == "switch_head" else 5)  # in both blocks of the unit
    assert all(np.abs(value).max() > 0 for value in traces.values())
    metrics = trajectory.metrics
    total = metrics["parts/loss"]
    total = total + 0.01 * metrics["parts/load_balance_N"].sum() + 0.001 * metrics["parts/z_N"].sum()
    assert metrics["parts/attention/load_balance_N"].shape == (2,)
    total = total + 0.1 * metrics["parts/attention/load_balance_N"].sum() + 0.01 * metrics["parts/attention/z_N"].sum()
    np.testing.assert_allclose(metrics["total"], total, rtol=1e-5)


def test_the_state_of_each_layer_follows_its_own_loads():
    one = decoders.train(config_of("mixture_state"), None, steps=1)[0]
    load_NE = one.metrics["parts/attention/stats/router/load_UE"].sum(1)
    found = {name: value for name, value in one.state.items() if "/attention/" in name and "bias_E" in name}
    assert len(found) == 2
    for name, bias_NE in found.items():
        layer = int("blocks/1" in name)
        expected = 0.1 * np.sign(load_NE[layer].mean() - load_NE[layer])
        np.testing.assert_allclose(bias_NE[0], expected, rtol=1e-6)
    assert not np.array_equal(*load_NE)


@functools.cache
def whole(form: str, sparse: bool = True):
    return decoders.gradients(config_of(form, sparse))


@pytest.mark.parametrize(
    ("form", "sparse"),
    [("mixture", True), pytest.param("mixture", False, marks=pytest.mark.slow), ("switch_head", False)],
)
def test_microbatches_add_up_to_the_batch(form, sparse):
    """Without experts in the feed-forward part too: the loads of the batch are then those of attention alone."""
    got = decoders.gradients(config_of(form, sparse), 4)
    assert_same(got, whole(form, sparse))
    assert_accounted(got, form)
    assert any(name.startswith("parts/stats/") for name in got) == sparse


@pytest.mark.parametrize("form", ["mixture", pytest.param("switch_head", marks=pytest.mark.slow)])
def test_scan_and_remat_change_nothing(form):
    got = decoders.gradients(config_of(form, num_layers=2, scan_layers=False, remat="full"))
    assert_same(got, whole(form))


@pytest.mark.parametrize("form", FORMS)
def test_no_token_sees_later_ones_other_documents_or_padding(form):
    logits = decoders.forward(config_of(form, sparse=False), True)
    batch = decoders.host_batch()
    tokens, segments, positions = (
        np.asarray(x)[:, 1:] for x in (batch.tokens_BL, batch.segments_BL, batch.positions_BL)
    )
    before, rng = logits(tokens, segments, positions), np.random.default_rng(1)
    for place in (2, 5):
        other = tokens.copy()
        other[:, place:] = rng.integers(0, decoders.VOCAB, other[:, place:].shape)
        after = logits(other, segments, positions)
        assert after[:, :place].tobytes() == before[:, :place].tobytes()
        assert np.any(after[:, place:] != before[:, place:])
    first = (segments == segments[:, :1]) & (segments > 0)
    after = logits(np.where(first, (tokens + 1) % decoders.VOCAB, tokens), segments, positions)
    second = (segments > 0) & ~first
    assert second.any() and after[second].tobytes() == before[second].tobytes()
    real = segments > 0
    after = logits(np.where(real, tokens, 1), segments, np.where(real, positions, 7))
    assert after[real].tobytes() == before[real].tobytes()


def test_bfloat16_trains_and_stays_close():
    got = decoders.gradients(config_of("mixture", sparse=False, dtype="bfloat16"))
    expected = whole("mixture", False)
    assert abs(got["parts/loss"] - expected["parts/loss"]) < 0.02 * expected["parts/loss"]
    assert all(np.all(np.isfinite(value)) for value in got.values())
    assert jax.numpy.dtype(config_of("mixture").dtype) == np.float32
