"""The sorted dispatch: its maps by hand, its hand-written gradients, and the exchange between devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.dispatch.all_to_all import AllToAll, _exchange
from sparse_lm.moe.dispatch.gather import Gather, Routes
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT

EXPERT = jnp.asarray([[[0, 1], [0, -1], [0, 1]], [[1, 0], [-1, -1], [1, 0]]])
GATE = jnp.asarray([[[0.5, 0.25], [0.75, 0.0], [0.9, 0.1]], [[0.6, 0.3], [0.0, 0.0], [0.2, 0.8]]])
DECISION = TokenChoice(EXPERT, GATE)
RULE = SlotRule(2)


@pytest.fixture
def routes() -> Routes:
    return Routes.of(DECISION, 2, RULE)


def test_maps_by_hand(routes):
    # Rows of an expert: two slots of group 0, then two of group 1. 6 is no token, 8 is no row.
    np.testing.assert_array_equal(routes.token_ER, [[0, 1, 3, 5], [0, 2, 3, 5]])
    np.testing.assert_array_equal(routes.row_MK, [[0, 4], [1, 8], [8, 5], [6, 2], [8, 8], [7, 3]])


def test_empty_rows_are_zero_and_numbers_follow_the_tokens():
    routes = Routes.of(TokenChoice(jnp.asarray([[[1], [-1], [1]]]), jnp.ones((1, 3, 1))), 2, SlotRule(3))
    np.testing.assert_array_equal(routes.token_ER, [[3, 3, 3], [0, 2, 3]])
    x_ERD = routes.to_slots(jnp.arange(1.0, 7.0).reshape(1, 3, 2))
    np.testing.assert_array_equal(x_ERD, [[[0, 0]] * 3, [[1, 2], [5, 6], [0, 0]]])
    np.testing.assert_array_equal(routes.ids(jnp.asarray([[7, 8, 9]])), [[0, 0, 0], [7, 9, 0]])


def test_combine_weighs_and_leaves_dropped_tokens_at_zero(routes):
    y_ERD = jnp.arange(8.0).reshape(2, 4, 1) + 1
    expected = [[0.5 * 1 + 0.25 * 5, 0.75 * 2, 0.1 * 6], [0.6 * 7 + 0.3 * 3, 0, 0.2 * 8 + 0.8 * 4]]
    np.testing.assert_allclose(routes.combine(y_ERD)[..., 0], expected, rtol=1e-6)
    assert routes.combine(y_ERD.astype(jnp.bfloat16)).dtype == jnp.float32


def test_gradients_against_plain_indexing(routes):
    x_GSD, out = jax.random.normal(jax.random.key(0), (2, 3, 4)), jax.random.normal(jax.random.key(1), (2, 4, 4))

    def plain(x_GSD):
        return x_GSD.reshape(-1, 4).at[routes.token_ER].get(mode="fill", fill_value=0)

    for one, two in zip(
        jax.vjp(plain, x_GSD)[1](out), jax.vjp(lambda x: routes.to_slots(x), x_GSD)[1](out), strict=True
    ):
        np.testing.assert_allclose(one, two, rtol=1e-6)

    def plain_combine(y_ERD, gate_GSK):
        rows = y_ERD.reshape(-1, 4).at[routes.row_MK].get(mode="fill", fill_value=0)
        return jnp.einsum("MK,MKD->MD", gate_GSK.reshape(-1, 2), rows).reshape(2, 3, 4)

    def fast_combine(y_ERD, gate_GSK):
        return Routes.of(TokenChoice(EXPERT, gate_GSK), 2, RULE).combine(y_ERD)

    dy = jax.random.normal(jax.random.key(2), (2, 3, 4))
    slow, fast = (jax.vjp(function, out, GATE)[1](dy) for function in (plain_combine, fast_combine))
    np.testing.assert_allclose(slow[0], fast[0], rtol=1e-6)
    np.testing.assert_allclose(slow[1], fast[1], rtol=1e-6, atol=1e-7)


def test_gradients_have_the_type_of_what_they_belong_to(routes):
    x_GSD, y_ERD = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((2, 4, 4), jnp.bfloat16)
    assert jax.grad(lambda x: routes.to_slots(x).astype(jnp.float32).sum())(x_GSD).dtype == jnp.bfloat16
    assert jax.grad(lambda y: routes.combine(y).sum())(y_ERD).dtype == jnp.bfloat16


def test_without_a_mesh_nothing_is_exchanged():
    experts = Experts(jax.random.key(0), (2, 4, 3), "relu")
    x_GSD = jax.random.normal(jax.random.key(0), (2, 3, 4))
    one, two = (cls(RULE, DEFAULT)(experts, x_GSD, DECISION)[0] for cls in (Gather, AllToAll))
    np.testing.assert_array_equal(one, two)


def test_the_exchange_brings_all_tokens_of_an_expert_together_and_back(mesh_of):
    x = jnp.arange(4 * 4 * 2.0).reshape(4 * 4, 2)  # four devices, each with two rows for each of four experts

    def there(_, x_ER, __):
        return _exchange(x_ER, 4, 0, 1)

    def back(_, x_ER, __):
        return _exchange(_exchange(x_ER, 4, 0, 1), 4, 1, 0)

    with jax.set_mesh(mesh_of(expert=4)):
        stored = DEFAULT.constrain(x, "G.")
        moved, same = (jax.jit(lambda x, f=f: DEFAULT.per_device(f, {}, x, None))(stored) for f in (there, back))
    # Device e holds expert e's rows from devices 0 to 3 side by side.
    expected = np.asarray(x).reshape(4, 4, 2).swapaxes(0, 1).reshape(4, 8)
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(same, x)
