"""Scores by themselves, with a bias for balance: DeepSeek-V3, Kimi-K2, Llama 4; with a softmax DeepSeek-V2."""

from __future__ import annotations

import dataclasses
from typing import Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import Extras, LinearScores, Router, RouterConfig, RouterShape, RouterState
from sparse_lm.moe.types import RouterInputs, RouterStats, Scores, TokenChoice
from sparse_lm.sharding import Rules

TINY = 1e-20  # keeps sums of scores away from 0, as in DeepSeek-V3's own program


@dataclasses.dataclass(frozen=True)
class Sigmoid(RouterConfig):
    """Options of sigmoid routing; the defaults are DeepSeek-V3's (arXiv 2412.19437, section 2.1.2).

    A token takes the K experts with the highest score + bias (equation 16); its gates are the scores without the bias.

    score: `sigmoid` of each logit by itself (V3, equation 15), or `softmax` over all experts (V2: arXiv 2405.04434,
        equation 22). Balance statistics use scores divided by their sum over all experts (V3, equation 19).
    renormalise: make the gates of a token sum to `scale` over its choices (V3, equation 13: `before_drop`), or to 1
        over the assignments that found a slot (`after_drop`, of this package); `none` in V2.
    scale: multiplies the gates after renormalisation: 2.5 in V3, 2.827 in Kimi-K2, 16.0 in V2 (routed_scaling_factor).
    num_groups, groups_kept: experts lie in num_groups equal runs, and a token may only use those of its best
        groups_kept runs: V3's nodes (8, 4), V2's devices (8, 3); 1, 1 is no limit (Kimi-K2).
    group_score: what makes a group good: `top2_sum` of its biased scores (V3), or their `max` (V2).
    bias_rate: step of the bias, which starts at 0; 0 leaves it there, for V2 or another balance loss. 0.001 in V3 and
        in loss-free balancing (arXiv 2408.15664). It only works if steps * bias_rate exceeds the spread of the scores:
        runs of a few thousand steps need about 0.01.
    bias_rule: from the loads of the whole batch of a step, before drops, mean - load being the lack of load:
        `sign`: bias += bias_rate * sign(mean - load) (2408.15664, algorithm 1); `linear`: bias += bias_rate * (mean -
        load) / mean. The paper's linear rule does not say in what units loads are; in shares of the mean, the step
        does not depend on the size of the batch.
    gate_on: what the gate multiplies: the expert's `output`, or its `input` (Llama 4, with top_k=1,
        renormalise=none, scale=1, bias_rate=0).
    pathway: add what the logits of the sparse layer before say, times a matrix (MoE++); see `Extras`.
    init_scale: of the router's weights, see `fan_in_normal`. DeepSeek's standard deviation of 0.006 is 0.006**2 * D.
    """

    kind = "sigmoid"
    takes_free = True

    score: Literal["sigmoid", "softmax"] = "sigmoid"
    renormalise: Literal["none", "before_drop", "after_drop"] = "before_drop"
    scale: float = option(2.5, gt=0)
    num_groups: int = option(1, ge=1)
    groups_kept: int = option(1, ge=1)
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    bias_rate: float = option(0.001, ge=0)
    bias_rule: Literal["sign", "linear"] = "sign"
    gate_on: Literal["output", "input"] = "output"
    pathway: bool = False
    init_scale: float = option(0.1, gt=0)

    def check(self) -> None:
        """Raises `ConfigError` when fields contradict each other."""
        if self.groups_kept > self.num_groups:
            raise ConfigError(
                "groups_kept", self.groups_kept, f"there are only num_groups={self.num_groups}; use as many or fewer"
            )
        if self.renormalise == "after_drop" and self.scale != 1:
            raise ConfigError(
                "scale", self.scale, "renormalise=after_drop makes gates sum to 1; use scale=1, or before_drop"
            )

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses gates that are constant, and groups that do not divide the experts or cannot fill the K choices."""
        if shape.top_k == 1 and self.renormalise != "none":
            raise ConfigError(
                "renormalise",
                self.renormalise,
                "with top_k=1 the gate becomes constant and the router learns nothing; use none",
            )
        if shape.num_experts % self.num_groups:
            raise ConfigError(
                "num_groups", self.num_groups, f"must divide num_experts={shape.num_experts}; use a divisor of it"
            )
        if self.groups_kept * (shape.num_experts // self.num_groups) < shape.top_k:
            raise ConfigError(
                "groups_kept",
                self.groups_kept,
                f"groups of {shape.num_experts // self.num_groups} experts do not hold top_k={shape.top_k}; use more",
            )

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return SigmoidRouter(key, self, shape, rules)


class SigmoidRouter(Router):
    """Chooses the K experts with the highest biased scores, from the best groups only.

    bias_E: the state, added to the scores for the choice alone; float32.
    """

    def __init__(self, key: jax.Array, config: Sigmoid, shape: RouterShape, rules: Rules):
        self.config, self.top_k, self.rules = config, shape.top_k, rules
        self.scores = LinearScores(key, shape, config.init_scale, rules, Extras(pathway=config.pathway))
        self.bias_E = RouterState(jnp.zeros((shape.num_experts,), jnp.float32))

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`. There is no noise: training and evaluation choose alike."""
        config = self.config
        logits_GSE = self.scores(inputs.x_GSD, 0.0, None, inputs.carried_GSE)
        if config.score == "sigmoid":
            score_GSE = jax.nn.sigmoid(logits_GSE)
            probability_GSE = score_GSE / (jnp.sum(score_GSE, axis=-1, keepdims=True) + TINY)
        else:
            score_GSE = probability_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        biased_GSE = jax.lax.stop_gradient(score_GSE) + self.rules.whole(self.bias_E[...])
        expert_GSK = jax.lax.top_k(self._within_groups(biased_GSE), self.top_k)[1]
        gate_GSK = jnp.take_along_axis(score_GSE, expert_GSK, axis=-1)
        if config.renormalise == "before_drop":
            gate_GSK = gate_GSK / (jnp.sum(gate_GSK, axis=-1, keepdims=True) + TINY)
        real_GS1 = inputs.mask_GS[..., None]
        decision = TokenChoice(
            expert_GSK=jnp.where(real_GS1, expert_GSK, -1).astype(jnp.int32),
            gate_GSK=jnp.where(real_GS1, config.scale * gate_GSK, 0.0),
            gate_on=config.gate_on,
        )
        carried_GSE = logits_GSE if config.pathway else None
        return decision, Scores(probability_GSE, jax.nn.logsumexp(logits_GSE, axis=-1), carried_GSE=carried_GSE)

    def updated(self, stats: RouterStats) -> Self:
        """The router after a step: experts with less than the mean load become easier to choose, the others harder."""
        config = self.config
        if config.bias_rate == 0:
            return self
        load_E = jnp.sum(stats.load_UE, axis=0).astype(jnp.float32)
        mean = jnp.mean(load_E)
        lack_E = mean - load_E
        step_E = jnp.sign(lack_E) if config.bias_rule == "sign" else lack_E / jnp.maximum(mean, 1.0)
        new = jax.tree.map(lambda leaf: leaf, self)
        new.bias_E[...] = self.rules.whole(self.bias_E[...]) + config.bias_rate * self.rules.whole(step_E)
        return new

    def _within_groups(self, biased_GSE: Float[Array, "G S E"]) -> Float[Array, "G S E"]:
        """-inf for the experts outside the best groups of the token."""
        config = self.config
        if config.groups_kept == config.num_groups:
            return biased_GSE
        groups, size, num_experts = biased_GSE.shape
        within = num_experts // config.num_groups
        by_group = self.rules.reshape(biased_GSE, (groups, size, config.num_groups, within), "GS..")
        best = min(2, within) if config.group_score == "top2_sum" else 1
        value = jnp.sum(jax.lax.top_k(by_group, best)[0], axis=-1)
        kept = jax.lax.top_k(value, config.groups_kept)[1]
        allowed = jnp.any(kept[..., None] == jnp.arange(config.num_groups), axis=-2)
        limited = jnp.where(allowed[..., None], by_group, -jnp.inf)
        return self.rules.reshape(limited, biased_GSE.shape, "GSE")
