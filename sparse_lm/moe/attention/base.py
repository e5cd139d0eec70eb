"""What an attention with experts is: projections chosen per token, around the ordinary attention of `sparse_lm.nn`.

Projections are computed for every expert and chosen by one-hot gates: exact, nothing is ever dropped, no token depends
on others of its batch, and no weight is copied per token. It costs E / k times the products of the chosen projections.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm.config import Config
from sparse_lm.moe.config import BalanceConfig
from sparse_lm.moe.stats import dispatch_stats, router_stats
from sparse_lm.moe.types import LayerStats, Scores, TokenChoice, pytree_dataclass
from sparse_lm.nn.attend import Sight
from sparse_lm.nn.cache import KeyValues
from sparse_lm.nn.heads import AttentionShape
from sparse_lm.sharding import Rules

Tree = TypeVar("Tree")


@pytree_dataclass
class AttentionInputs:
    """What an attention sees beside the activations: see `nn.attention.Attention`.

    real_BL: False is padding, which gets no expert. ids_BL: token ids, for routers that look at them; previous_BL: the
    id before in the same document, -1 where there is none; None is -1 everywhere. record: whether the statistics hold
    the decisions as well.
    """

    positions_BL: Int[Array, "B L"]
    sight: Sight
    real_BL: Bool[Array, "B L"]
    ids_BL: Int[Array, "B L"]
    previous_BL: Int[Array, "B L"] | None = None
    record: bool = dataclasses.field(default=False, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class AttentionCost:
    """Parameters of one layer. total: stored. active: those that a token uses. multiplied: in its matrix products.

    router: how many of the active ones belong to routers.
    """

    total: int
    active: int
    multiplied: int
    router: int


class ExpertAttention(nnx.Module, abc.ABC):
    """Drop-in for `nn.attention.Attention`, with statistics of its routing beside."""

    @abc.abstractmethod
    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        inputs: AttentionInputs,
        key: jax.Array | None = None,
        cache: tuple[KeyValues, jax.Array] | None = None,
    ) -> tuple[Float[Array, "B L D"], KeyValues | None, LayerStats]:
        """The result, the cache with `x` in it, and the statistics. key: None is evaluation."""

    def with_updated_router(self, stats: LayerStats) -> ExpertAttention:
        """The layer after a step whose whole batch had these statistics (U = 1); itself, unless a router has a state.

        May be mapped over stacked layers.
        """
        return self


class AttentionExperts(Config, abc.ABC):
    """Base of the options of an attention with experts; a subclass is a frozen dataclass with an attribute `kind`."""

    kind: str
    num_experts: int
    top_k: int
    balance: BalanceConfig

    @abc.abstractmethod
    def build(self, key: jax.Array, shape: AttentionShape, rules: Rules) -> ExpertAttention:
        """The attention of one layer with fresh weights."""

    @abc.abstractmethod
    def cost(self, shape: AttentionShape) -> AttentionCost:
        """Parameters of one layer, its routers included."""

    def check_shape(self, shape: AttentionShape) -> None:
        """Raises `ConfigError` (keys as in the model's configuration) where the heads do not fit the experts."""

    @property
    def losses(self) -> BalanceConfig:
        """The weights of the router losses; all 0 where no gradient reaches the router."""
        return self.balance

    def names(self, num_heads: int) -> tuple[str, ...]:
        """What the experts that statistics and decisions count are called, in their order."""
        return tuple(map(str, range(self.num_experts)))


def as_groups(tree: Tree, rules: Rules) -> Tree:
    """Arrays over [B, L, ...] laid out as groups of one row each, which are whole where rows are cut."""
    return jax.tree.map(lambda leaf: rules.constrain(leaf, "GS" + "." * (leaf.ndim - 2)), tree)


def attention_stats(decision: TokenChoice, scores: Scores, inputs: AttentionInputs, rules: Rules) -> LayerStats:
    """Statistics of a layer in which every row is a group and nothing is dropped."""
    counted, scores, real_GS = as_groups((decision, scores, inputs.real_BL), rules)
    return LayerStats(
        router_stats(counted, scores, real_GS, real_GS.shape[1], rules),
        dispatch_stats(counted, counted.expert_GSK >= 0, real_GS, scores.probability_GSE.shape[-1]),
        decision if inputs.record else None,
    )


def whole_experts(rules: Rules, weight: jax.Array, letters: str, dtype) -> jax.Array:
    """A stored projection with all experts on every device, cast first; the cut along heads stays."""
    assert letters[0] == "E"
    return rules.constrain(weight.astype(dtype), letters)


def merge(weight: jax.Array, product: jax.Array, subscripts: str, rules: Rules) -> jax.Array:
    """An einsum of float32 gates with activations, summed in float32, in the dtype of the activations."""
    return rules.einsum(subscripts, weight, product.astype(jnp.float32)).astype(product.dtype)
