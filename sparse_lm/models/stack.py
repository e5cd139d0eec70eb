"""The layers of a model: equal ones are stored stacked and run by one scan, whatever pattern their kinds make.

The layers are cut into segments: the first dense layers, the repeated unit (for example dense layers and then a sparse
one), and layers that are left over. Parameters are stacked the same way whether they are scanned or not, so that a
checkpoint does not depend on `scan_layers`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm.config import ConfigError
from sparse_lm.mesh import manual_axis_size
from sparse_lm.models.block import Block, Context
from sparse_lm.models.config import LayerKind, ModelConfig
from sparse_lm.models.depth import Depth, DepthCache
from sparse_lm.models.reports import Reports, concatenate, flatten, stack
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.types import LayerStats, Replay, RouterStats
from sparse_lm.nn.cache import AttentionCache
from sparse_lm.nn.dropout import split_keys
from sparse_lm.nn.remat import policy
from sparse_lm.sharding import Rules, staged

BlockCache = AttentionCache | DepthCache
Cache = tuple[tuple[BlockCache, ...], ...]  # per segment, per block of its unit, stacked over repeats
Kind = TypeVar("Kind")
Layer = TypeVar("Layer")
Carry = tuple[jax.Array, jax.Array | None]
Stats = TypeVar("Stats", RouterStats, LayerStats)


class Unit(nnx.Module):
    """A few different layers in a row."""

    def __init__(self, key: jax.Array, config: ModelConfig, pattern: tuple[LayerKind, ...], rules: Rules):
        keys = jax.random.split(key, len(pattern))
        self.blocks = nnx.List(
            [
                Depth(k, config, kind, rules) if kind.wrapped else Block(k, config, kind, rules)
                for k, kind in zip(keys, pattern, strict=True)
            ]
        )

    def __call__(
        self, x_BLD: jax.Array, context: Context, key: jax.Array | None, caches: tuple[BlockCache, ...] | None
    ) -> tuple[jax.Array, jax.Array | None, Reports, tuple[BlockCache, ...] | None]:
        """Runs the layers: output, what the last router handed on, reports (each kind stacked), caches."""
        reports, stored, replay, sparse = [], [], context.replay, 0
        keys = split_keys(key, len(self.blocks))
        for i, block in enumerate(self.blocks):
            if replay is not None and isinstance(block.feed_forward, MoE):
                # Its own decisions, of those of the sparse layers of this unit.
                own = jax.tree.map(lambda leaf, n=sparse: leaf[n], replay)
                context, sparse = dataclasses.replace(context, replay=own), sparse + 1
            cache = None if caches is None else caches[i]
            # A block's cache is of its own kind.
            x_BLD, report, cache = block(x_BLD, context, keys[i], cache)  # type: ignore[arg-type]
            if report.feed_forward is not None and report.feed_forward.carried_BLE is not None:
                context = dataclasses.replace(context, carried_BLE=report.feed_forward.carried_BLE)
                kept = dataclasses.replace(report.feed_forward, carried_BLE=None)
                report = dataclasses.replace(report, feed_forward=kept)
            reports.append(report)
            stored.append(cache)
        return x_BLD, context.carried_BLE, stack(reports), None if caches is None else tuple(stored)


def refuse_stages() -> None:
    """Raises `ConfigError` on a mesh with stages, for what does not pass a pipeline in microbatches."""
    if (stages := manual_axis_size("stage")) > 1:
        raise ConfigError(
            "mesh.stage", stages, "stages are for training and its evaluation; for this use mesh.stage=1, on which a "
            "checkpoint of any mesh is read",
        )  # fmt: skip


def segments(layers: tuple[Kind, ...], period: int) -> list[tuple[int, tuple[Kind, ...]]]:
    """(repeats, pattern of a unit) for each run of equal units; laid end to end they are the model's layers.

    layers: the kind of each. period: after how many layers kinds repeat, from some layer on.
    """
    first = len(layers)
    while first > 0 and (first - 1 + period >= len(layers) or layers[first - 1] == layers[first - 1 + period]):
        first -= 1
    body = (len(layers) - first) // period
    head, tail = layers[:first], layers[first + body * period :]

    def runs(part: tuple[Kind, ...]) -> list[tuple[int, tuple[Kind, ...]]]:
        return [(len(list(group)), (kind,)) for kind, group in itertools.groupby(part)]

    unit = [(body, layers[first : first + period])] if body else []
    return runs(head) + unit + runs(tail)


class Stack(nnx.Module):
    """All layers of a model."""

    def __init__(self, key: jax.Array, config: ModelConfig, rules: Rules):
        self.config, self.rules = config, rules
        self.plan = tuple(segments(config.layers, config.period))
        self.units = nnx.List(
            [
                jax.vmap(lambda k, pattern=pattern: Unit(k, config, pattern, rules))(jax.random.split(k, repeats))
                for (repeats, pattern), k in zip(self.plan, jax.random.split(key, len(self.plan)), strict=True)
            ]
        )

    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, key: jax.Array | None, cache: Cache | None = None
    ) -> tuple[Float[Array, "B L D"], Reports, Cache | None]:
        """The last layer's output; the layers' reports, each kind stacked over the layers that make it; the cache."""
        refuse_stages()
        all_reports, all_caches, start, carried_BLE = [], [], 0, self.nothing_carried(x_BLD)
        keys = self.layer_keys(key)
        for i, (repeats, pattern) in enumerate(self.plan):
            places = sum(kind.sparse for kind in pattern)
            replay = _by_unit(context.replay, start, repeats, places)
            start += repeats * places
            inputs = (self.units[i], keys[i], None if cache is None else cache[i], replay)
            (x_BLD, carried_BLE), (reports, stored) = self.run((x_BLD, carried_BLE), context, inputs)
            all_reports.append(reports)
            all_caches.append(stored)
        return x_BLD, concatenate(all_reports), None if cache is None else tuple(all_caches)

    def with_updated_routers(self, stats: RouterStats) -> Self:
        """The stack after a step whose whole batch had these statistics, stacked over sparse layers (see `Router`)."""
        new = jax.tree.map(lambda leaf: leaf, self)  # other modules around the same arrays
        for block, own in new._each(stats, lambda kind: kind.sparse):
            layer = block.feed_forward
            assert isinstance(layer, MoE)
            layer.router = _updated(lambda router, stats: router.updated(stats), layer.router, own)
        return new

    def with_updated_attention(self, stats: LayerStats) -> Self:
        """The same for the routers of attention experts, which every layer has."""
        new = jax.tree.map(lambda leaf: leaf, self)
        for block, own in new._each(stats, lambda kind: True):
            block.attention = _updated(lambda layer, stats: layer.with_updated_router(stats), block.attention, own)
        return new

    def _each(self, stats: Stats, has: Callable[[LayerKind], bool]) -> Iterator[tuple[Any, Stats]]:
        """The stacked blocks of the layers that have what `stats` are of, and their share of the statistics."""
        start = 0
        for unit, (repeats, pattern) in zip(self.units, self.plan, strict=True):
            places = [place for place, kind in enumerate(pattern) if has(kind)]
            stop = start + repeats * len(places)
            for number, place in enumerate(places):
                share = slice(start + number, stop, len(places))
                yield unit.blocks[place], jax.tree.map(lambda leaf, share=share: leaf[share], stats)
            start = stop

    def layer_keys(self, key: jax.Array | None) -> list[jax.Array | None]:
        """For each segment, a key per unit; None in evaluation."""
        of_segments = zip(split_keys(key, len(self.plan)), self.plan, strict=True)
        return [None if k is None else jax.random.split(k, repeats) for k, (repeats, _) in of_segments]

    def nothing_carried(self, x_BLD: jax.Array) -> jax.Array | None:
        """What the router of the first sparse layer gets, if routers ask for what is handed on."""
        moe = self.config.moe
        if moe is None or not moe.router.pathway:
            return None
        return self.rules.constrain(jnp.zeros((*x_BLD.shape[:2], moe.num_choices), jnp.float32), "BLE")

    def run(self, carry: Carry, context: Context, inputs: tuple) -> tuple[Carry, tuple[Reports, Any]]:
        """Equal units in a row: what they hand on, their reports (each kind stacked over layers) and caches.

        carry: activations, and what the sparse layer before handed on to the router. inputs: units, keys, caches and
        decisions to replay, each stacked over the units, or None.
        """

        def body(carry, inputs):
            x_BLD, carried_BLE = carry
            unit, key, caches, replay = inputs
            context_here = dataclasses.replace(context, replay=replay, carried_BLE=carried_BLE)
            x_BLD, carried_BLE, reports, caches = unit(x_BLD, context_here, key, caches)
            return (x_BLD, carried_BLE), (reports, caches)

        keep = policy(self.config.remat)
        if keep is not None:
            body = jax.checkpoint(body, policy=keep, prevent_cse=not self.config.scan_layers)
        if self.config.scan_layers:
            carry, (reports, caches) = jax.lax.scan(body, carry, inputs)
        else:
            outputs = []
            for i in range(len(jax.tree.leaves(inputs)[0])):
                carry, output = body(carry, jax.tree.map(lambda leaf, i=i: leaf[i], inputs))
                outputs.append(output)
            reports, caches = jax.tree.map(lambda *parts: jnp.stack(parts), *outputs)
        return carry, (flatten(reports), caches)


def _updated(update: Callable[[Layer, Any], Layer], stacked: Layer, stats: Any) -> Layer:
    """`update` of every one of the stacked layers by its own statistics; both lie where the layers do."""
    stages, layers = manual_axis_size("stage"), len(jax.tree.leaves(stats)[0])
    return jax.vmap(update)(*staged((stacked, stats), cut=stages > 1 and layers % stages == 0))


def _by_unit(replay: Replay | None, start: int, repeats: int, places: int) -> Replay | None:
    """Decisions of all sparse layers -> [repeats, places, ...], those of the segment that begins at layer `start`."""
    if replay is None or not places:
        return replay if replay is None else Replay(record=replay.record)
    stop = start + repeats * places
    return jax.tree.map(lambda leaf: leaf[start:stop].reshape(repeats, places, *leaf.shape[1:]), replay)
