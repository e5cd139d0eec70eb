"""ReLU routing with an adaptive L1 penalty: ReMoE (arXiv 2412.14711)."""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import LinearScores, Router, RouterConfig, RouterShape, RouterState
from sparse_lm.moe.types import RouterInputs, RouterStats, Scores, TokenChoice
from sparse_lm.sharding import Rules

# Between these the coefficient stays a normal float32, so that it can always come back.
SMALLEST, LARGEST = 1e-30, 1e30


@dataclasses.dataclass(frozen=True)
class Relu(RouterConfig):
    """Options of ReLU routing; the defaults are the paper's.

    The gates are max(logit, 0), and a token uses every expert with a positive gate: top_k is how many that should be on
    average. What drives it there is a penalty on the gates, whose coefficient rises while too many are positive:
    coefficient *= growth ** sign(target - sparsity), where the target is 1 - top_k / E and sparsity is the share of
    gates of a step's real tokens that are 0 (adaptive L1 regularisation).

    coefficient: where it starts. growth: its factor per step (alpha). It stays within 1e-30 and 1e30.
    refine_balance: weigh the gates of an expert in the penalty with its share of the assignments, times E / top_k, so
        that the experts that are used most are pushed down most (load balancing in the L1 term); without it all weights
        are 1.
    max_active: a token uses at most this many experts, those with the highest gates. None: no limit, as in the paper.
    init_scale: of the router's weights, see `fan_in_normal`.

    Conventions that the paper leaves open, or that differ from it: coefficient and sparsity are each layer's own (the
    paper has one coefficient, for the mean sparsity of all layers), and the penalty is summed over layers, like all
    router losses here. Shares of the assignments are those of the routing group, so that the penalty does not depend
    on microbatches or devices, and are counted before `max_active`; the sparsity is counted after it. The statistics
    of the load-balance loss, the z-loss and the entropy are those of a softmax over the logits: the paper has neither
    loss (set `balance.load` and `balance.z` to 0). Capacity is reckoned from top_k, and half the experts of a token
    are active at the start, so use `capacity_factor=None`, unless early drops are wanted.
    """

    kind = "relu"
    takes_free = True

    coefficient: float = option(1e-8, gt=0)
    growth: float = option(1.2, gt=1)
    refine_balance: bool = True
    max_active: int | None = option(None, ge=1)
    init_scale: float = option(0.1, gt=0)

    def check(self) -> None:
        """Raises `ConfigError` when the coefficient is out of the range that it is kept in."""
        if not SMALLEST <= self.coefficient <= LARGEST:
            raise ConfigError("coefficient", self.coefficient, f"must be within {SMALLEST} and {LARGEST}")

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses a limit that leaves the penalty nothing to steer by, or that is none."""
        if self.max_active is None:
            return
        if self.max_active <= shape.top_k < shape.num_experts:
            raise ConfigError(
                "max_active",
                self.max_active,
                f"never lets more than top_k={shape.top_k} experts be active, so that the penalty only ever falls; "
                "use more, or None",
            )
        if self.max_active > shape.num_experts:
            raise ConfigError(
                "max_active", self.max_active, f"there are only num_experts={shape.num_experts}; use fewer, or None"
            )

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return ReluRouter(key, self, shape, rules)


class ReluRouter(Router):
    """Uses every expert with a positive logit. coefficient: the state, of the penalty; a float32 scalar."""

    def __init__(self, key: jax.Array, config: Relu, shape: RouterShape, rules: Rules):
        self.config, self.shape = config, shape
        self.scores = LinearScores(key, shape, config.init_scale, rules)
        self.coefficient = RouterState(jnp.asarray(config.coefficient, jnp.float32))

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`. There is no noise: training and evaluation choose alike."""
        width = self.shape.num_experts if self.config.max_active is None else self.config.max_active
        logits_GSE = self.scores(inputs.x_GSD, 0.0, None)
        relu_GSE = jax.nn.relu(logits_GSE)
        expert_GSK = jax.lax.top_k(jax.lax.stop_gradient(relu_GSE), width)[1]
        gate_GSK = jnp.take_along_axis(relu_GSE, expert_GSK, axis=-1)
        used_GSK = (gate_GSK > 0) & inputs.mask_GS[..., None]
        decision = TokenChoice(
            expert_GSK=jnp.where(used_GSK, expert_GSK, -1).astype(jnp.int32),
            gate_GSK=jnp.where(used_GSK, gate_GSK, 0.0),
        )
        scores = Scores(
            jax.nn.softmax(logits_GSE, axis=-1),
            jax.nn.logsumexp(logits_GSE, axis=-1),
            self._penalty(relu_GSE, inputs.mask_GS),
        )
        return decision, scores

    def updated(self, stats: RouterStats) -> Self:
        """The router after a step: the coefficient grows when too few gates were 0, and shrinks otherwise."""
        possible = jnp.sum(stats.tokens_U).astype(jnp.float32) * self.shape.num_experts
        used = jnp.sum(stats.load_UE).astype(jnp.float32)
        # target - sparsity is the share of gates that are positive, less top_k / E; times all gates it is exact.
        excess = used - possible * (self.shape.top_k / self.shape.num_experts)
        value = self.coefficient[...] * self.config.growth ** jnp.sign(excess)
        new = jax.tree.map(lambda leaf: leaf, self)
        new.coefficient[...] = jnp.clip(value, SMALLEST, LARGEST)
        return new

    def _penalty(self, relu_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]) -> Float[Array, "G S"]:
        """coefficient * sum_e f_e gate_e per token; no gradient goes through f, which counts."""
        coefficient = jax.lax.stop_gradient(self.coefficient[...])
        if not self.config.refine_balance:
            return coefficient * jnp.sum(relu_GSE, axis=-1)
        count_GE = jnp.sum((relu_GSE > 0) & mask_GS[..., None], axis=1, dtype=jnp.float32)
        tokens_G1 = jnp.maximum(jnp.sum(mask_GS, axis=1, keepdims=True, dtype=jnp.float32), 1.0)
        weight_GE = count_GE * (self.shape.num_experts / self.shape.top_k) / tokens_G1
        return coefficient * jnp.sum(weight_GE[:, None, :] * relu_GSE, axis=-1)
