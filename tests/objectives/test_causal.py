"""Next-token prediction: what is predicted, its loss against log-softmax, and the router losses beside it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.batch import Batch
from sparse_lm.models.reports import Reports
from sparse_lm.moe.config import BalanceConfig, HeterogeneousBalance
from sparse_lm.moe.types import DispatchStats, LayerStats, RouterStats
from sparse_lm.objectives.causal import Totals, causal_loss, count, predicted, token_losses
from sparse_lm.sharding import DEFAULT

VOCAB = 5
TOKENS = jnp.asarray([[1, 2, 3, 4, 0], [2, 2, 1, 0, 0]])
SEGMENTS = jnp.asarray([[1, 1, 2, 2, 2], [1, 1, 1, 0, 0]])
TARGETS = jnp.asarray([[1, 1, 1, 0, 1], [0, 1, 1, 1, 1]])
DOMAINS = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
BATCH = Batch(TOKENS, SEGMENTS, jnp.zeros_like(TOKENS), TARGETS, DOMAINS)
PREDICTED = [[1, 0, 0, 1], [1, 1, 0, 0]]  # no first token of a document, no unmarked one, no padding
LOGITS = jax.random.normal(jax.random.key(0), (2, 4, VOCAB))


def router_stats() -> LayerStats:
    """Two layers, two units, two experts."""
    load = jnp.asarray([[[3, 1], [0, 2]], [[2, 2], [1, 1]]])
    importance = jnp.asarray([[[2.5, 1.5], [0.5, 1.5]], [[2.0, 2.0], [1.0, 1.0]]])
    tokens = jnp.asarray([[4, 2], [4, 2]])
    z = jnp.asarray([[4.0, 2.0], [12.0, 0.0]])
    dispatch = DispatchStats(**{name: jnp.zeros((2,), jnp.int32) for name in DispatchStats.__dataclass_fields__})
    return LayerStats(RouterStats(tokens, 0 * tokens, 0 * tokens, load, importance, z, 0 * z, 0 * z), dispatch)


def apply(tokens, segments, positions, key):
    assert tokens.shape == segments.shape == positions.shape == (2, 4)
    return LOGITS, Reports()


def apply_sparse(*inputs):
    return LOGITS, Reports(router_stats())


def nats() -> np.ndarray:
    logits = np.asarray(LOGITS, np.float64)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    picked = np.take_along_axis(log_probability, np.asarray(TOKENS)[:, 1:, None], -1)[..., 0]
    return -picked * np.array(PREDICTED)


def test_what_is_predicted_by_hand():
    np.testing.assert_array_equal(predicted(BATCH), PREDICTED)


def test_totals_count_targets_and_routed_tokens():
    totals = count(BATCH)
    assert (float(totals.targets), float(totals.tokens)) == (4, 7)
    assert totals.load_NE is None


def test_token_losses_are_negative_log_softmax_also_for_large_logits():
    logits, labels = 1e4 * LOGITS, TOKENS[:, 1:]
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    np.testing.assert_allclose(token_losses(logits, labels), expected, rtol=1e-6)
    gradient = jax.grad(lambda x: token_losses(x, labels).sum())(LOGITS)
    one_hot = jax.nn.one_hot(labels, VOCAB)
    np.testing.assert_allclose(gradient, jax.nn.softmax(LOGITS) - one_hot, rtol=1e-5, atol=1e-6)


def test_token_losses_on_a_cut_vocabulary(mesh_of):
    logits = jax.random.normal(jax.random.key(1), (2, 4, 8))
    expected = token_losses(logits, TOKENS[:, 1:])
    with jax.set_mesh(mesh_of(data=2, model=4)):
        cut = DEFAULT.constrain(logits, "BLV")
        got = jax.jit(token_losses)(cut, DEFAULT.constrain(TOKENS[:, 1:], "BL"))
        np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_dense_loss_and_domains_by_hand():
    total, parts = causal_loss(apply, BATCH, None, count(BATCH), None, 2)
    np.testing.assert_allclose(total, nats().sum() / 4, rtol=1e-6)
    assert float(total) == float(parts.loss)
    assert parts.stats is None
    assert parts.load_balance_N.shape == parts.z_N.shape == (0,)
    first, second = nats()[0, 0], nats().sum() - nats()[0, 0]
    np.testing.assert_allclose(parts.domain_loss, [first, second], rtol=1e-6)
    np.testing.assert_array_equal(parts.domain_targets, [1, 3])


@pytest.mark.parametrize(
    ("scope", "balance"), [("sequence", [1.25, 1.0]), ("group", [1.25, 1.0]), ("global", [1.0, 1.0])]
)
def test_router_losses_by_hand(scope, balance):
    totals = Totals(jnp.asarray(4.0), jnp.asarray(6.0))
    config = BalanceConfig(load=0.1, z=0.01, scope=scope)
    total, parts = causal_loss(apply_sparse, BATCH, None, totals, config, 2)
    np.testing.assert_allclose(parts.load_balance_N, balance, rtol=1e-6)
    np.testing.assert_allclose(parts.z_N, [1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(total, nats().sum() / 4 + 0.1 * sum(balance) + 0.01 * 3, rtol=1e-6)
    np.testing.assert_allclose(parts.loss, nats().sum() / 4, rtol=1e-6)
    assert parts.stats is not None
    np.testing.assert_array_equal(parts.stats.router.load_UE, [[[3, 3]], [[3, 3]]])
    np.testing.assert_array_equal(parts.stats.router.tokens_U, [[6], [6]])


@pytest.mark.parametrize(("scope", "balance"), [("group", [1.40625, 1.125]), ("global", [1.125, 1.125])])
def test_experts_of_unequal_weight_by_hand(scope, balance):
    """The second expert is a free one of half the weight: (1 + 2) * (f_1 P_1 + 0.5 f_2 P_2)."""
    config = HeterogeneousBalance(load=0.1, z=0.0, scope=scope, expert_weights=(1.0, 0.5))
    total, parts = causal_loss(apply_sparse, BATCH, None, Totals(jnp.asarray(4.0), jnp.asarray(6.0)), config, 2)
    np.testing.assert_allclose(parts.load_balance_N, balance, rtol=1e-6)
    np.testing.assert_allclose(total, nats().sum() / 4 + 0.1 * sum(balance), rtol=1e-6)


def test_entropy_is_a_loss_where_it_has_a_weight():
    def sure(tokens, segments, positions, key):
        reports = router_stats()
        entropy = jnp.asarray([[3.0, 1.0], [2.0, 0.0]])  # sums over the units of two layers
        return LOGITS, Reports(
            dataclasses.replace(reports, router=dataclasses.replace(reports.router, entropy_U=entropy))
        )

    totals = Totals(jnp.asarray(4.0), jnp.asarray(8.0))
    off, on = (BalanceConfig(load=0.0, z=0.0, entropy=weight) for weight in (0.0, -0.1))
    without, with_entropy = (causal_loss(sure, BATCH, None, totals, weights, 2)[0] for weights in (off, on))
    np.testing.assert_allclose(with_entropy - without, -0.1 * (4 / 8 + 2 / 8), rtol=1e-5)


def test_a_declared_loss_that_nobody_computes_is_an_error():
    @dataclasses.dataclass(frozen=True)
    class More(BalanceConfig):
        orthogonality: float = 0.5

    totals = Totals(jnp.asarray(4.0), jnp.asarray(8.0))
    with pytest.raises(ValueError, match=r"orthogonality.*entropy.*load.*z"):
        causal_loss(apply_sparse, BATCH, None, totals, More(), 2)
    causal_loss(apply_sparse, BATCH, None, totals, More(orthogonality=0.0), 2)


def test_loads_of_the_whole_batch_replace_those_of_the_microbatch():
    totals = Totals(jnp.asarray(4.0), jnp.asarray(6.0), jnp.asarray([[6, 0], [0, 6]]))
    _, parts = causal_loss(apply_sparse, BATCH, None, totals, BalanceConfig(scope="global"), 2)
    np.testing.assert_allclose(parts.load_balance_N, [2 * 3.0 / 6, 2 * 3.0 / 6], rtol=1e-6)
    totals = Totals(jnp.asarray(4.0), jnp.asarray(6.0), jnp.asarray([[3, 1], [3, 1]]))
    _, parts = causal_loss(apply_sparse, BATCH, None, totals, BalanceConfig(scope="global"), 2)
    np.testing.assert_allclose(parts.load_balance_N, [2 * (0.75 * 3 + 0.25 * 3) / 6] * 2, rtol=1e-6)


def test_shares_of_microbatches_divide_by_the_whole():
    totals = Totals(jnp.asarray(40.0), jnp.asarray(60.0))
    _, parts = causal_loss(apply_sparse, BATCH, None, totals, BalanceConfig(scope="sequence"), 2)
    np.testing.assert_allclose(parts.loss, nats().sum() / 40, rtol=1e-6)
    np.testing.assert_allclose(parts.load_balance_N, [0.125, 0.1], rtol=1e-6)


def test_nothing_to_predict_is_zero_and_not_nan():
    values: dict[str, Any] = {**vars(BATCH), "segments_BL": jnp.zeros_like(SEGMENTS)}
    empty = Batch(**values)
    total, parts = causal_loss(apply, empty, None, count(empty), None, 2)
    assert float(total) == 0
    np.testing.assert_array_equal(parts.domain_targets, [0, 0])
