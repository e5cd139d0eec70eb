"""The batch is a pytree of five arrays, on the host and on the devices alike."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from sparse_lm.batch import Batch

NAMES = ["tokens_BL", "segments_BL", "positions_BL", "targets_BL", "domains_BL"]


def example() -> Batch:
    return Batch(*(np.full((2, 3), value, np.int32) for value in range(5)))  # pyright: ignore[reportArgumentType]


def test_leaves_are_the_fields_in_order():
    leaves = jax.tree.leaves_with_path(example())
    assert [jax.tree_util.keystr(path) for path, _ in leaves] == [f".{name}" for name in NAMES]
    assert [int(leaf[0, 0]) for _, leaf in leaves] == [0, 1, 2, 3, 4]


def test_goes_through_jit_and_scan_and_keeps_its_type():
    out = jax.jit(lambda batch: jax.tree.map(lambda x: x + 1, batch))(example())
    assert isinstance(out, Batch) and isinstance(out.tokens_BL, jax.Array)
    np.testing.assert_array_equal(out.domains_BL, np.full((2, 3), 5))
    halves = jax.tree.map(lambda x: x.reshape(2, 1, 3), example())
    total, _ = jax.lax.scan(lambda count, batch: (count + batch.targets_BL.sum(), None), 0, halves)
    assert int(total) == 18


def test_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        example().tokens_BL = np.zeros((2, 3))  # pyright: ignore[reportAttributeAccessIssue]
