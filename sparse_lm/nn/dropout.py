"""Dropout whose mask does not depend on the mesh."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sparse_lm.mesh import explicit_mesh


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Sets a share `rate` of the values to zero and scales the others by 1 / (1 - rate).

    key: None is evaluation: nothing is dropped.
    """
    if key is None or rate == 0:
        return x
    sharding = jax.typeof(x).sharding if explicit_mesh() else None
    keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=sharding)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))


def split_keys(key: jax.Array | None, count: int) -> Sequence[jax.Array | None] | jax.Array:
    """`count` keys of one; None stays None, since evaluation draws nothing."""
    return [None] * count if key is None else jax.random.split(key, count)
