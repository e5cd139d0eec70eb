"""Soft MoE: weights by hand, its symmetries, padding, and what the configuration refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.routers.base import RouterShape
from sparse_lm.moe.routers.soft import SoftMixture, SoftRouter
from sparse_lm.moe.types import RouterInputs, Scores, Soft
from sparse_lm.sharding import DEFAULT

OPTIONS = {
    "num_experts": 4,
    "top_k": 2,
    "every": 1,
    "d_expert": 6,
    "group_size": 8,
    "capacity_factor": 1.0,
    "capacity_factor_eval": 1.0,
    "dispatcher": "einsum",
    "router": SoftMixture(),
}


def decide(x, mask, phi, scale=1.0) -> tuple[Soft, Scores]:
    router = SoftMixture(scale).build(jax.random.key(0), RouterShape(2, 2, 1, 1), DEFAULT)
    router.phi_DEC[...] = jnp.asarray(phi)
    mask_GS = jnp.asarray(mask)
    return router(RouterInputs(jnp.asarray(x), mask_GS, jnp.zeros_like(mask_GS, jnp.int32), 1), None)


def test_weights_by_hand():
    # Two tokens along the axes, however long; two experts with a slot each, at the first token and between both.
    x = [[[3.0, 0.0], [0.0, 0.5]]]
    phi = [[[2.0], [1.0]], [[0.0], [1.0]]]
    decision, scores = decide(x, [[True, True]], phi, 2.0)
    a, b = 2.0, 2.0 / np.sqrt(2)  # logits: token 0 has (a, b), token 1 has (0, b)
    first = np.exp([a, 0.0]) / np.exp([a, 0.0]).sum()
    np.testing.assert_allclose(decision.dispatch_GSEC[0, :, 0, 0], first, rtol=1e-5)
    np.testing.assert_allclose(decision.dispatch_GSEC[0, :, 1, 0], [0.5, 0.5], rtol=1e-5)
    combine = [np.exp([a, b]) / np.exp([a, b]).sum(), np.exp([0, b]) / np.exp([0, b]).sum()]
    np.testing.assert_allclose(decision.combine_GSEC[0, :, :, 0], combine, rtol=1e-5)
    np.testing.assert_allclose(scores.probability_GSE[0], combine, rtol=1e-5)
    np.testing.assert_allclose(scores.logsumexp_GS[0], np.log([np.exp(a) + np.exp(b), 1 + np.exp(b)]), rtol=1e-5)


def test_padding_is_in_no_slot_and_gets_nothing():
    x = [[[3.0, 0.0], [0.0, 0.5]], [[1.0, 1.0], [2.0, 0.0]]]
    decision, _ = decide(x, [[True, False], [False, False]], [[[2.0], [1.0]], [[0.0], [1.0]]])
    np.testing.assert_array_equal(decision.dispatch_GSEC[0, :, :, 0], [[1.0, 1.0], [0.0, 0.0]])
    assert not jnp.any(decision.dispatch_GSEC[1]) and not jnp.any(decision.combine_GSEC[1])
    np.testing.assert_array_equal(decision.choices(jnp.asarray([[True, False], [False, False]])).expert_GSK[0, 1], -1)


def layer(**changes) -> MoE:
    return MoE(jax.random.key(1), 5, 6, "gelu", MoEConfig(**{**OPTIONS, **changes}), DEFAULT)


def test_a_group_has_no_order():
    x_BLD = jax.random.normal(jax.random.key(2), (3, 8, 5))
    order = np.random.default_rng(0).permutation(8)
    y_BLD = layer()(x_BLD, jnp.ones((3, 8), bool))[0]
    np.testing.assert_allclose(layer()(x_BLD[:, order], jnp.ones((3, 8), bool))[0], y_BLD[:, order], atol=1e-6)


def test_every_token_is_counted_with_every_expert_and_none_is_dropped():
    mask_BL = jnp.ones((3, 8), bool).at[1, 6:].set(False)
    stats = layer()(jax.random.normal(jax.random.key(2), (3, 8, 5)), mask_BL)[1]
    np.testing.assert_array_equal(jnp.sum(stats.router.load_UE, axis=0), [22] * 4)
    assert (int(stats.dispatch.kept), int(stats.dispatch.dropped)) == (88, 0)
    np.testing.assert_allclose(stats.dispatch.gate_mass, 22, rtol=1e-5)


def test_slots_follow_the_capacity():
    for changes, slots in (({}, 4), ({"top_k": 1, "capacity_factor": 0.5, "capacity_factor_eval": 0.5}, 1)):
        router = layer(**changes).router
        assert isinstance(router, SoftRouter)
        assert router.phi_DEC.shape == (5, 4, slots)


def test_the_task_reaches_the_slots():
    module, x_BLD = layer(), jax.random.normal(jax.random.key(2), (3, 8, 5))
    gradient = jax.grad(lambda m: jnp.sum(jnp.square(m(x_BLD, jnp.ones((3, 8), bool))[0])))(module)
    assert jnp.all(gradient.router.phi_DEC[...] != 0)
    assert gradient.router.scale[...] != 0


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"dispatcher": "gather"}, "dispatcher.*gather.*einsum"),
        ({"group_size": None}, "router.kind.*group_size"),
        ({"capacity_factor": None}, "capacity_factor.*set a number"),
        ({"capacity_factor_eval": 2.0}, r"capacity_factor_eval.*use 1\.0"),
    ],
)
def test_what_cannot_work_is_refused(changes, error):
    with pytest.raises(ConfigError, match=error):
        MoEConfig(**{**OPTIONS, **changes})
