"""What a router is: weights, and a rule that turns tokens into a decision."""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sparse_lm.config import Config
from sparse_lm.moe.types import RouterInputs, RouterStats, Scores, TokenChoice
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.remat import named
from sparse_lm.sharding import DEFAULT, Rules


@dataclasses.dataclass(frozen=True)
class RouterShape:
    """What every router is told about the layer that it serves. slots: of an expert per group, where that is fixed."""

    d_model: int
    num_experts: int
    top_k: int
    slots: int | None = None


class RouterState(nnx.Variable):
    """What a router changes by a rule, not by gradients: updated by the train step, checkpointed."""


class Router(nnx.Module, abc.ABC):
    """Decides which experts see which tokens. All arithmetic is float32, whatever the dtype of x; `TopK` has an option.

    A router does not count: sums over its decisions are made in `sparse_lm.moe.stats`, the same for all.
    """

    @abc.abstractmethod
    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """Decides for every group by itself. key: None is evaluation. (A mixture of tokens, `Soft`, is no choice.)"""

    def updated(self, stats: RouterStats) -> Self:
        """The router after a step whose whole batch had these statistics (U = 1); itself, unless it holds a state."""
        return self


class RouterConfig(Config, abc.ABC):
    """Base of the options of a router; a subclass is a frozen dataclass with a class attribute `kind`."""

    kind: str

    @abc.abstractmethod
    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """The router with fresh weights."""

    def parameters(self, shape: RouterShape) -> tuple[int, int]:
        """How many parameters such a router has, its state not among them, and how many of them are in products."""
        built = jax.eval_shape(lambda key: nnx.state(self.build(key, shape, DEFAULT), nnx.Param), jax.random.key(0))
        leaves = jax.tree.leaves(built)
        return sum(leaf.size for leaf in leaves), sum(leaf.size for leaf in leaves if leaf.ndim >= 2)

    def check_shape(self, shape: RouterShape) -> None:
        """Raises `ConfigError` where the router cannot serve such a layer. Overridden where there is a limit."""

    causal = True  # whether a token's experts depend on no later token
    disjoint = False  # whether different choices of tokens never share an expert
    learned = True  # whether a gradient reaches the router's scores, so that balance losses mean something
    needs_slots = False  # whether experts fill their slots, so that there must be a capacity
    fixed_slots = False  # whether slots have weights, so that their number cannot change
    dispatchers: tuple[str, ...] | None = None  # those that can carry the decisions; None is all
    pathway = False  # whether it sees the logits of the sparse layer before; an option where a router can
    takes_free = False  # whether some of the experts may be free ones (`moe.free`), which have no slots


class Extras(NamedTuple):
    """What logits may have beside a linear map of the token.

    bias: a learned one, which starts at 0 (gpt-oss). pathway: G_j = x W + G_{j-1} W_g, with G_{j-1} the logits of the
    sparse layer before and no such term in the first (gating residuals: Jin et al. 2024, MoE++, section 3.2).
    Conventions: W_g starts at 0, so that training starts from the router without it; gradients pass to the layers
    before; every layer stores a W_g, and the first one's does nothing.
    """

    bias: bool = False
    pathway: bool = False


PLAIN = Extras()


class LinearScores(nnx.Module):
    """The linear map from tokens to a logit per expert, in float32 (selective precision: Fedus et al. 2021, 2.4)."""

    def __init__(
        self,
        key: jax.Array,
        shape: RouterShape,
        init_scale: float,
        rules: Rules,
        extras: Extras = PLAIN,
        dtype: str = "float32",
    ):
        """extras: what the logits have beside. dtype: whose digits the products have, see `rounded`."""
        self.rules, self.dtype = rules, dtype
        bias, pathway = extras
        self.logit_bias_E = nnx.Param(jnp.zeros((shape.num_experts,), jnp.float32)) if bias else None
        self.weight_DE = nnx.Param(fan_in_normal(key, (shape.d_model, shape.num_experts), shape.d_model, init_scale))
        experts = shape.num_experts
        self.pathway_KE = nnx.Param(jnp.zeros((experts, experts), jnp.float32)) if pathway else None

    def __call__(
        self,
        x_GSD: Float[Array, "G S D"],
        jitter: float,
        key: jax.Array | None,
        carried_GSE: Float[Array, "G S E"] | None = None,
    ) -> Float[Array, "G S E"]:
        """Logits, float32.

        jitter: the input is multiplied by a uniform number in [1 - jitter, 1 + jitter], in training only.
        carried_GSE: the logits of the sparse layer before, if the pathway counts; None is 0.
        """
        rules, dtype = self.rules, self.dtype
        x_GSD = rounded(x_GSD, dtype)
        if jitter > 0 and key is not None:
            uniform = functools.partial(jax.random.uniform, minval=1 - jitter, maxval=1 + jitter)
            x_GSD = rounded(x_GSD * rounded(rules.draw(uniform, key, x_GSD.shape, "GSD"), dtype), dtype)
        logits_GSE = rules.einsum("GSD,DE->GSE", x_GSD, rounded(rules.whole(self.weight_DE[...]), dtype))
        if self.logit_bias_E is not None:
            logits_GSE = logits_GSE + rounded(rules.whole(self.logit_bias_E[...]), dtype)
        if self.pathway_KE is not None and carried_GSE is not None:
            weight_KE = rounded(rules.whole(self.pathway_KE[...]), dtype)
            logits_GSE = logits_GSE + rules.einsum("GSK,KE->GSE", carried_GSE, weight_KE)
        return named(rounded(logits_GSE, dtype), "router")


def rounded(x: jax.Array, dtype: str) -> jax.Array:
    """`x` as float32 with the digits of `dtype`. A cast alone would not do: XLA keeps digits within what it fuses."""
    x, digits = x.astype(jnp.float32), jnp.finfo(dtype)
    return x if dtype == "float32" else jax.lax.reduce_precision(x, digits.nexp, digits.nmant)
