"""Dispatch without a capacity: loads that a capacity would cut, against the dense oracle; both gates; gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.dispatch.dense import Dense
from sparse_lm.moe.dispatch.dropless import Dropless
from sparse_lm.moe.dispatch.ragged_all_to_all import RaggedAllToAll
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT

G, S, E, D = 2, 6, 4, 5
X_GSD = jax.random.normal(jax.random.key(0), (G, S, D))
RNG = np.random.default_rng(0)
LOADS = {
    "mixed": np.stack([RNG.permutation(E)[:2] for _ in range(G * S)]).reshape(G, S, 2),
    "one_expert": np.full((G, S, 1), 2),
    "nobody": np.full((G, S, 2), -1),
    "first_and_last": np.broadcast_to([0, E - 1], (G, S, 2)),
    "some_declined": np.where(RNG.random((G, S, 2)) < 0.5, -1, np.broadcast_to([1, 3], (G, S, 2))),
}


@pytest.mark.parametrize("gate_on", ["output", "input"])
@pytest.mark.parametrize("name", LOADS)
def test_every_load_is_served_whole(name, gate_on):
    experts = Experts(jax.random.key(1), (E, D, 7), "swiglu")
    expert_GSK = jnp.asarray(LOADS[name], jnp.int32)
    gate_GSK = jnp.where(expert_GSK >= 0, jax.random.uniform(jax.random.key(2), expert_GSK.shape), 0.0)

    def total(cls, experts, x_GSD, gate_GSK):
        decision = TokenChoice(expert_GSK, gate_GSK, gate_on=gate_on)
        y_GSD, kept_GSK = cls(SlotRule(S), DEFAULT)(experts, x_GSD, decision)
        return jnp.sum(jnp.sin(y_GSD)), (y_GSD, kept_GSK)

    def run(cls):
        function = jax.value_and_grad(lambda *arguments: total(cls, *arguments), (0, 1, 2), has_aux=True)
        return jax.jit(function)(experts, X_GSD, gate_GSK)

    (_, (y_GSD, kept_GSK)), gradients = run(Dropless)
    (_, (expected_GSD, _)), exact = run(Dense)
    np.testing.assert_array_equal(kept_GSK, expert_GSK >= 0)
    np.testing.assert_allclose(y_GSD, expected_GSD, atol=1e-6)
    for got, expected in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact), strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("cls", [Dropless, RaggedAllToAll])
def test_the_capacity_of_the_rule_means_nothing(cls):
    experts = Experts(jax.random.key(1), (E, D, 7), "gelu")
    decision = TokenChoice(jnp.full((G, S, 1), 2, jnp.int32), jnp.ones((G, S, 1)))
    kept_GSK = cls(SlotRule(1), DEFAULT)(experts, X_GSD, decision)[1]
    assert bool(jnp.all(kept_GSK))
