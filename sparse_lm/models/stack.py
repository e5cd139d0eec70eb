"""The layers of a model: equal ones are stored stacked and run by one scan, whatever pattern dense and sparse make.

The layers are cut into up to three segments: the first dense layers, the repeated unit (dense layers and then a sparse
one), and dense layers that are left over. Parameters are stacked the same way whether they are scanned or not, so that
a checkpoint does not depend on `scan_layers`.
"""

from __future__ import annotations

from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm.models.block import Block, Context
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.types import LayerStats, RouterStats
from sparse_lm.nn.attention import KeyValues
from sparse_lm.nn.dropout import split_keys
from sparse_lm.sharding import Rules

Cache = tuple[tuple[KeyValues, ...], ...]  # per segment, per block of its unit, stacked over repeats

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Unit(nnx.Module):
    """A few different layers in a row."""

    def __init__(self, key: jax.Array, config: ModelConfig, pattern: tuple[bool, ...], rules: Rules):
        keys = jax.random.split(key, len(pattern))
        self.blocks = nnx.List([Block(k, config, sparse, rules) for k, sparse in zip(keys, pattern, strict=True)])

    def __call__(
        self, x_BLD: jax.Array, context: Context, key: jax.Array | None, caches: tuple[KeyValues, ...] | None
    ) -> tuple[jax.Array, LayerStats | None, tuple[KeyValues, ...] | None]:
        """Runs the layers; at most one of them is sparse."""
        stats, stored = None, []
        keys = split_keys(key, len(self.blocks))
        for i, block in enumerate(self.blocks):
            cache = None if caches is None else caches[i]
            x_BLD, new, cache = block(x_BLD, context, keys[i], cache)
            stats = stats if new is None else new
            stored.append(cache)
        return x_BLD, stats, None if caches is None else tuple(stored)


def segments(sparse: tuple[bool, ...], every: int) -> list[tuple[int, tuple[bool, ...]]]:
    """(repeats, pattern of a unit) for each run of equal units; laid end to end they are the model's layers."""
    first = sparse.index(True) + 1 - every if True in sparse else len(sparse)
    body = (len(sparse) - first) // every if True in sparse else 0
    tail = len(sparse) - first - body * every
    parts = [(first, (False,)), (body, (False,) * (every - 1) + (True,)), (tail, (False,))]
    return [(repeats, pattern) for repeats, pattern in parts if repeats]


class Stack(nnx.Module):
    """All layers of a model."""

    def __init__(self, key: jax.Array, config: ModelConfig, rules: Rules):
        self.config = config
        self.plan = tuple(segments(config.sparse, config.moe.every if config.moe else 1))
        self.units = nnx.List(
            [
                jax.vmap(lambda k, pattern=pattern: Unit(k, config, pattern, rules))(jax.random.split(k, repeats))
                for (repeats, pattern), k in zip(self.plan, jax.random.split(key, len(self.plan)), strict=True)
            ]
        )

    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, key: jax.Array | None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], LayerStats | None, Cache | None]:
        """The last layer's output; statistics stacked over the sparse layers (None if there are none); the cache."""
        all_stats, all_caches = [], []
        keys = split_keys(key, len(self.plan))
        for i, (repeats, _) in enumerate(self.plan):
            layer_key = keys[i]
            layer_keys = None if layer_key is None else jax.random.split(layer_key, repeats)
            inputs = (self.units[i], layer_keys, None if cache is None else cache[i])
            x_BLD, (stats, stored) = self._run(x_BLD, context, inputs, repeats)
            all_stats += [] if stats is None else [stats]
            all_caches.append(stored)
        stats = jax.tree.map(lambda *parts: jnp.concatenate(parts), *all_stats) if all_stats else None
        return x_BLD, stats, None if cache is None else tuple(all_caches)

    def with_updated_routers(self, stats: RouterStats) -> Self:
        """The stack after a step whose whole batch had these statistics, stacked over sparse layers (see `Router`)."""
        new = jax.tree.map(lambda leaf: leaf, self)  # other modules around the same arrays
        for unit, (_, pattern) in zip(new.units, self.plan, strict=True):
            if pattern[-1]:  # the sparse layers are the last ones of the units of one segment
                layer = unit.blocks[-1].feed_forward
                layer.router = jax.vmap(lambda router, stats: router.updated(stats))(layer.router, stats)
        return new

    def _run(self, x_BLD, context, inputs, repeats):
        def body(x_BLD, inputs):
            unit, key, caches = inputs
            x_BLD, stats, caches = unit(x_BLD, context, key, caches)
            return x_BLD, (stats, caches)

        if self.config.remat != "none":
            body = jax.checkpoint(body, policy=_POLICIES[self.config.remat], prevent_cse=not self.config.scan_layers)
        if self.config.scan_layers:
            return jax.lax.scan(body, x_BLD, inputs)
        outputs = []
        for i in range(repeats):
            x_BLD, output = body(x_BLD, jax.tree.map(lambda leaf, i=i: leaf[i], inputs))
            outputs.append(output)
        return x_BLD, jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)
