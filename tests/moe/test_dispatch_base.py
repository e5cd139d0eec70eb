"""What dispatchers share: numbers of tokens and experts that seed dropout, and the interface."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.moe.dispatch import DISPATCHERS, Dispatcher
from sparse_lm.moe.dispatch.base import apply_experts
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT

X_GSD = jax.random.normal(jax.random.key(3), (2, 4, 5))
EXPERT = jnp.asarray([[[0, 1], [0, 2], [1, 2], [-1, -1]], [[2, 0], [2, -1], [2, 1], [2, 0]]])
GATE = jnp.where(EXPERT >= 0, jax.random.uniform(jax.random.key(4), EXPERT.shape), 0.0)
DECISION = TokenChoice(EXPERT, GATE)

# Compiled, with the dispatcher as a constant.
run = jax.jit(lambda dispatcher, *inputs: dispatcher(*inputs), static_argnums=0)

LIMITED = [name for name, cls in DISPATCHERS.items() if cls.has_capacity]


def experts(rate: float = 0.0) -> Experts:
    return Experts(jax.random.key(0), (3, 5, 7), "gelu", dropout_rate=rate)


def test_experts_without_dropout_need_no_numbers():
    module, x_ERD = experts(), jax.random.normal(jax.random.key(1), (3, 2, 5))
    ids_ER = jnp.zeros((3, 2), jnp.int32)
    np.testing.assert_array_equal(apply_experts(module, x_ERD, None, jax.random.key(0)), module(x_ERD))
    np.testing.assert_array_equal(apply_experts(module, x_ERD, ids_ER, None), module(x_ERD))


def test_a_number_for_every_pair_of_token_and_expert():
    module, x_ERD = experts(0.5), jax.random.normal(jax.random.key(1), (3, 2, 5))
    ids_ER, key = jnp.asarray([[4, 1], [4, 1], [0, 9]]), jax.random.key(2)
    expected = module(x_ERD, jnp.asarray([[12, 3], [13, 4], [2, 29]]), key)
    np.testing.assert_array_equal(apply_experts(module, x_ERD, ids_ER, key), expected)


@pytest.mark.parametrize("name", LIMITED)
def test_every_dispatcher_sums_the_kept_experts_of_a_token(name):
    module, rule = experts(), SlotRule(2)
    y_GSD, kept_GSK = run(DISPATCHERS[name](rule, DEFAULT), module, X_GSD, DECISION)
    # Group 0 fits; in group 1 expert 2 has slots for tokens 0 and 1 only.
    expected_kept = np.array([[[1, 1], [1, 1], [1, 1], [0, 0]], [[1, 1], [1, 0], [0, 1], [0, 1]]], bool)
    np.testing.assert_array_equal(kept_GSK, expected_kept)
    expected = np.zeros(X_GSD.shape)
    for g, s, k in zip(*np.nonzero(expected_kept), strict=True):
        rows = module(jnp.broadcast_to(X_GSD[g, s], (3, 1, 5)))
        expected[g, s] += np.asarray(GATE[g, s, k] * rows[EXPERT[g, s, k], 0])
    np.testing.assert_allclose(y_GSD, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DISPATCHERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_output_has_the_type_of_the_tokens(name, dtype):
    y_GSD, _ = run(DISPATCHERS[name](SlotRule(2), DEFAULT), experts(), X_GSD.astype(dtype), DECISION)
    assert y_GSD.dtype == dtype


@pytest.mark.parametrize("name", DISPATCHERS)
def test_dropout_needs_a_key_and_both_groups_draw_their_own(name):
    dispatcher, module = DISPATCHERS[name](SlotRule(4), DEFAULT), experts(0.5)
    plain, _ = run(dispatcher, experts(), X_GSD, DECISION)
    np.testing.assert_array_equal(run(dispatcher, module, X_GSD, DECISION)[0], plain)
    same = jnp.broadcast_to(X_GSD[:1], X_GSD.shape)
    decision = TokenChoice(jnp.broadcast_to(EXPERT[:1], EXPERT.shape), jnp.broadcast_to(GATE[:1], GATE.shape))
    dropped, _ = run(dispatcher, module, same, decision, jax.random.key(5))
    assert not np.allclose(dropped[0, :3], dropped[1, :3])


def test_which_move_tokens_and_which_have_a_capacity():
    assert {name for name, cls in DISPATCHERS.items() if cls.moves_tokens} == {"all_to_all", "ragged_all_to_all"}
    assert set(DISPATCHERS) - set(LIMITED) == {"dropless", "ragged_all_to_all"}
    with pytest.raises(TypeError, match="abstract"):
        Dispatcher(SlotRule(1), DEFAULT)  # type: ignore[abstract]


@pytest.mark.parametrize("name", sorted(set(DISPATCHERS) - set(LIMITED)))
def test_a_kernel_that_cannot_run_here_is_refused_before_anything_is_computed(name):
    with pytest.raises(ConfigError, match=r"model.moe.grouped='megablox'.* use auto"):
        jax.eval_shape(DISPATCHERS[name](SlotRule(1), DEFAULT, "megablox"), experts(), X_GSD, DECISION)


@pytest.mark.parametrize("devices", [2, 8])  # three experts: fewer devices, and more
@pytest.mark.parametrize("name", DISPATCHERS)
def test_a_mesh_that_cannot_cut_the_experts_evenly_is_refused(name, devices, mesh_of):
    with (
        jax.set_mesh(mesh_of(expert=devices)),
        pytest.raises(
            ConfigError,
            match=rf"num_experts=3.*mesh.expert={devices} does not divide it, nor .* width 7; use a multiple",
        ),
    ):
        DISPATCHERS[name](SlotRule(1), DEFAULT)(experts(), X_GSD, DECISION)
