"""Mixture of Depths: a block that some tokens of a row pass through and the others skip (Raposo et al. 2024).

A scalar router gives every token a weight r = w . x. In training the C tokens of a row with the highest weights pass
through the whole block, attention among themselves at their own positions included, and come out as
x + r (block(x) - x); the others stay as they are (2404.02258, section 3.4). Who is among the highest C depends on later
tokens. Evaluation and generation therefore go by a predictor that sees one token at a time (section 3.5): every token
is computed, those of which the predictor says no are seen by none and stay as they are, and no shape depends on how
many there are.

All of the router's and the predictor's arithmetic is float32. Ties go to the earlier token, padding is never chosen.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm.models.block import Block, Context
from sparse_lm.models.config import LayerKind, ModelConfig
from sparse_lm.models.reports import DepthStats, Reports
from sparse_lm.moe.layer import MoE
from sparse_lm.moe.types import pytree_dataclass
from sparse_lm.nn.cache import AttentionCache
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.mlp import Mlp
from sparse_lm.nn.norm import unit_mean_square
from sparse_lm.sharding import Rules


@pytree_dataclass
class DepthCache:
    """The cache of the block inside, and which of the tokens in it took part: the others are seen by none."""

    stored: AttentionCache
    taken_BT: Bool[Array, "*N B T"]


class Depth(nnx.Module):
    """A `Block` around which tokens may go; called like one."""

    def __init__(self, key: jax.Array, config: ModelConfig, kind: LayerKind, rules: Rules):
        """config: with `depth` set. kind: of the block inside."""
        assert config.depth is not None
        block, router, predictor = jax.random.split(key, 3)
        self.options, self.rules = config.depth, rules
        self.block = Block(block, config, kind, rules)
        self.weight_D = nnx.Param(fan_in_normal(router, (config.d_model,), config.d_model))
        separate = config.depth.predictor == "mlp"
        self.predictor = Predictor(predictor, config.d_model, config.depth.hidden, rules) if separate else None

    def __call__(
        self, x_BLD: Float[Array, "B L D"], context: Context, key: jax.Array | None, cache: DepthCache | None = None
    ) -> tuple[Float[Array, "B L D"], Reports, DepthCache | None]:
        """The block's output where tokens take part, their input elsewhere; see `Block`. key: None is evaluation.

        With a cache there is no report on depth: whether a token is among the highest of its row is not yet known.
        """
        rules = self.rules
        weight_BL = rules.einsum("BLD,D->BL", x_BLD.astype(jnp.float32), rules.whole(self.weight_D[...]))
        # What decides leaves no gradient; the weight in the output and the predictor's loss do.
        logit_BL = weight_BL if self.predictor is None else self.predictor(jax.lax.stop_gradient(x_BLD))
        says_BL = (logit_BL > 0) & context.real_BL
        if cache is not None:
            return self._evaluate(x_BLD, weight_BL, says_BL, context, cache)
        chosen_BL, index_BC = rules.per_group(
            lambda weight, real: choose(weight, real, self.options.slots(weight.shape[1])),
            jax.lax.stop_gradient(weight_BL),
            context.real_BL,
            axis="B",
        )
        if key is None:
            x_BLD, reports, _ = self._evaluate(x_BLD, weight_BL, says_BL, context, None)
        else:
            x_BLD, reports = self._train(x_BLD, weight_BL, index_BC, context, key)
        processed_BL = says_BL if key is None else chosen_BL
        stats = depth_stats(processed_BL, chosen_BL, logit_BL, context.real_BL)
        return x_BLD, dataclasses.replace(reports, depth=stats), None

    @property
    def feed_forward(self) -> MoE | Mlp:
        """That of the block inside."""
        return self.block.feed_forward

    def _train(self, x_BLD, weight_BL, index_BC, context: Context, key):
        """The chosen tokens alone, in the order in which they stand in the row."""
        per_row = functools.partial(self.rules.per_group, axis="B")
        # A row with fewer than C real tokens fills up with padding.
        inner = {name: per_row(take, value, index_BC) for name, value in vars(context).items() if _per_token(value)}
        sight = jax.tree.map(lambda value: per_row(take, value, index_BC), context.sight)
        inner["sight"] = dataclasses.replace(sight, layout="subset")
        inner_context = dataclasses.replace(context, **inner)
        x_BCD = self.rules.constrain(per_row(take, x_BLD, index_BC), "BLD")
        weight_BC = per_row(take, weight_BL, index_BC)
        y_BCD, reports, _ = self.block(x_BCD, inner_context, key)
        change_BCD = _change(x_BCD, y_BCD, weight_BC, inner_context.real_BL)
        return self.rules.constrain(per_row(add_at, x_BLD, change_BCD, index_BC), "BLD"), reports

    def _evaluate(self, x_BLD, weight_BL, says_BL, context: Context, cache: DepthCache | None):
        """All tokens, of which those that do not take part are keys for none and padding for the experts."""
        taken_BT = says_BL
        if cache is not None:
            assert context.start is not None
            taken_BT = jax.lax.dynamic_update_slice_in_dim(cache.taken_BT, says_BL, context.start, axis=1)
        inner = dataclasses.replace(context, sight=context.sight.hiding(~taken_BT), real_BL=says_BL)
        y_BLD, reports, stored = self.block(x_BLD, inner, None, None if cache is None else cache.stored)
        x_BLD = x_BLD + _change(x_BLD, y_BLD, weight_BL, says_BL)
        return x_BLD, reports, None if stored is None else DepthCache(stored, taken_BT)


class Predictor(nnx.Module):
    """From a token, scaled to unit mean square, to a logit that is positive if it would be chosen: one hidden layer."""

    def __init__(self, key: jax.Array, d_model: int, hidden: int, rules: Rules):
        up, down = jax.random.split(key)
        self.rules = rules
        self.up_DF = nnx.Param(fan_in_normal(up, (d_model, hidden), d_model))
        self.bias_F = nnx.Param(jnp.zeros((hidden,), jnp.float32))
        self.down_F = nnx.Param(fan_in_normal(down, (hidden,), hidden))

    def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L"]:
        """Logits in float32."""
        rules, x_BLD = self.rules, x_BLD.astype(jnp.float32)
        x_BLD = unit_mean_square(x_BLD, eps=1e-6)
        hidden_BLF = rules.einsum("BLD,DF->BLF", x_BLD, rules.gather(self.up_DF[...], "DF"))
        hidden_BLF = jax.nn.relu(hidden_BLF + rules.gather(self.bias_F[...], "F"))
        return rules.einsum("BLF,F->BL", hidden_BLF, rules.gather(self.down_F[...], "F"))


def choose(
    weight_BL: Float[Array, "B L"], real_BL: Bool[Array, "B L"], slots: int
) -> tuple[Bool[Array, "B L"], Int[Array, "B C"]]:
    """Which real tokens are among the `slots` highest of their row, and the places of these, in order.

    A row with fewer real tokens fills up with the places of padding.
    """
    order_BL = jnp.argsort(jnp.where(real_BL, -weight_BL, jnp.inf), axis=1, stable=True)
    inside_BL = jnp.argsort(order_BL, axis=1, stable=True) < slots
    index_BC = jnp.argsort(~inside_BL, axis=1, stable=True)[:, :slots].astype(jnp.int32)
    return inside_BL & real_BL, index_BC


def take(x_BL: Array, index_BC: Int[Array, "B C"]) -> Array:
    """[B, L, ...] -> [B, C, ...]: the tokens at distinct places of their rows."""
    rows_B1 = jnp.arange(x_BL.shape[0])[:, None]
    return x_BL.at[rows_B1, index_BC].get(unique_indices=True, mode="promise_in_bounds")


def add_at(x_BLD: Array, change_BCD: Array, index_BC: Int[Array, "B C"]) -> Array:
    """`x` with something added at distinct places of its rows; the way back from `take`."""
    rows_B1 = jnp.arange(x_BLD.shape[0])[:, None]
    return x_BLD.at[rows_B1, index_BC].add(change_BCD, unique_indices=True, mode="promise_in_bounds")


def depth_stats(
    processed_BL: Bool[Array, "B L"],
    chosen_BL: Bool[Array, "B L"],
    logit_BL: Float[Array, "B L"],
    real_BL: Bool[Array, "B L"],
) -> DepthStats:
    """Counts, and the predictor's cross-entropy, over all rows. logit_BL: positive where it says chosen."""

    def count(where_BL):
        return jnp.sum(where_BL, dtype=jnp.int32)

    nats_BL = jax.nn.softplus(logit_BL) - jnp.where(chosen_BL, logit_BL, 0.0)
    return DepthStats(
        processed=count(processed_BL),
        skipped=count(real_BL & ~processed_BL),
        padding=count(~real_BL),
        chosen=count(chosen_BL),
        agreed=count(((logit_BL > 0) == chosen_BL) & real_BL),
        loss=jnp.sum(jnp.where(real_BL, nats_BL, 0.0)),
    )


def routed_tokens(config: ModelConfig, real_BL: Bool[Array, "B L"]) -> Float[Array, "N"]:
    """How many tokens each sparse layer routes in training, known before any layer runs: what its losses divide by."""
    real_B = jnp.sum(real_BL, axis=1, dtype=jnp.int32)
    assert config.depth is not None
    everywhere, chosen = jnp.sum(real_B), jnp.sum(jnp.minimum(real_B, config.depth.slots(real_BL.shape[1])))
    counts = [chosen if kind.wrapped else everywhere for kind in config.layers if kind.sparse]
    return jnp.stack(counts).astype(jnp.float32) if counts else jnp.zeros((0,), jnp.float32)


def _per_token(value) -> bool:
    return isinstance(value, jax.Array) and value.ndim == 2


def _change(x_BLD, y_BLD, weight_BL, takes_part_BL):
    change_BLD = weight_BL[..., None] * (y_BLD - x_BLD)
    return jnp.where(takes_part_BL[..., None], change_BLD, 0.0).astype(x_BLD.dtype)
