"""What the layers of a model report beside activations: sums that add over devices, layers and microbatches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparse_lm.moe.types import LayerStats, pytree_dataclass
from sparse_lm.sharding import Rules


@pytree_dataclass
class DepthStats:
    """Sums over the tokens of a block that only some of them pass through; layers may be stacked in front.

    processed + skipped + padding are all tokens: those that went through the block (in training the chosen ones, in
    evaluation those of which the predictor says so), the other real ones, and padding. chosen: real tokens among the
    top C of their row. agreed: real tokens of which the predictor says rightly whether they are chosen.
    loss: sum over real tokens of the predictor's cross-entropy, in nats.
    """

    processed: Int[Array, "*N"]
    skipped: Int[Array, "*N"]
    padding: Int[Array, "*N"]
    chosen: Int[Array, "*N"]
    agreed: Int[Array, "*N"]
    loss: Float[Array, "*N"]


@pytree_dataclass
class Reports:
    """One layer's reports, or those of a model, each kind stacked over the layers that make it; None where none does.

    feed_forward: of sparse feed-forward layers. attention: of layers whose attention has experts, which are all or
    none. depth: of blocks that tokens may skip.
    """

    feed_forward: LayerStats | None = None
    attention: LayerStats | None = None
    depth: DepthStats | None = None


def concatenate(parts: Sequence[Reports]) -> Reports:
    """The reports of several runs of layers, each stacked already, as one stack per kind."""

    def joined(name: str):
        present = [getattr(part, name) for part in parts if getattr(part, name) is not None]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *present) if present else None

    return Reports(**{field.name: joined(field.name) for field in dataclasses.fields(Reports)})


def stack(parts: Sequence[Reports]) -> Reports:
    """The reports of single layers, in order, as one stack per kind."""
    return concatenate([jax.tree.map(lambda leaf: leaf[None], part) for part in parts])


def flatten(reports: Reports) -> Reports:
    """[repeats, layers of a unit, ...] -> [layers, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:]), reports)


def join(reports: Reports, rules: Rules) -> Reports:
    """The reports of microbatches [M, layers, ...] -> those of all of them [layers, ...], with all of their units."""

    def units(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 2)
        return rules.reshape(x, (x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:]), ".U" + "." * (x.ndim - 3))

    def layers(stats: LayerStats | None) -> LayerStats | None:
        return stats and LayerStats(jax.tree.map(units, stats.router), total(stats.dispatch))

    def total(tree):
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)

    return Reports(layers(reports.feed_forward), layers(reports.attention), total(reports.depth))
