"""The data that routers, dispatchers and losses exchange: frozen, pytrees, and additive."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.moe.types import DispatchStats, LayerStats, RouterStats, Scores, TokenChoice, pytree_dataclass


def filled(cls, value: int):
    """An instance whose every field but the static ones is a small array."""
    return cls(**{field.name: jnp.full((2,), value) for field in arrays(cls)})


def arrays(cls):
    """The fields that are no static ones."""
    return [field for field in dataclasses.fields(cls) if not field.metadata.get("static")]


@pytest.mark.parametrize("cls", [TokenChoice, Scores, RouterStats, DispatchStats])
def test_every_field_is_a_leaf_and_survives_a_round_trip(cls):
    one = filled(cls, 3)
    leaves, tree = jax.tree.flatten(one)
    assert len(leaves) == len(arrays(cls))
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, cls)
    for field in arrays(cls):
        assert getattr(again, field.name) is getattr(one, field.name)


@pytest.mark.parametrize("cls", [TokenChoice, Scores, RouterStats, DispatchStats])
def test_fields_are_frozen(cls):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(filled(cls, 0), dataclasses.fields(cls)[0].name, 1)


def test_statistics_add_through_jit_and_scan():
    stats = LayerStats(filled(RouterStats, 1), filled(DispatchStats, 2))

    @jax.jit
    def five_times(stats):
        zeros = jax.tree.map(jnp.zeros_like, stats)
        return jax.lax.scan(lambda carry, _: (jax.tree.map(jnp.add, carry, stats), None), zeros, length=5)[0]

    total = five_times(stats)
    assert isinstance(total, LayerStats)
    np.testing.assert_array_equal(total.router.load_UE, [5, 5])
    np.testing.assert_array_equal(total.dispatch.kept, [10, 10])


def test_paths_have_the_names_of_the_fields():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(filled(TokenChoice, 0))]
    assert paths == [".expert_GSK", ".gate_GSK", ".order_GS"]


def test_any_dataclass_can_be_made_one():
    @pytree_dataclass
    class Pair:
        one: jax.Array
        two: jax.Array

    doubled = jax.tree.map(lambda x: 2 * x, Pair(jnp.asarray(1), jnp.asarray(2)))
    assert (int(doubled.one), int(doubled.two)) == (2, 4)
