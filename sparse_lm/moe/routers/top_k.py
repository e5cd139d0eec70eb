"""Top-k routing: Switch (k = 1), GShard (k = 2 with a policy for the second expert), Mixtral, OLMoE, Qwen."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import Extras, LinearScores, Router, RouterConfig, RouterShape, rounded
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice
from sparse_lm.nn.dropout import dropout, split_keys
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class TopK(RouterConfig):
    """Options of top-k routing.

    gate: `softmax_before` (over all experts, then choose: Switch, GShard, OLMoE), `softmax_after` (over the chosen
        logits: Mixtral; equals softmax_before with renormalisation).
    renormalise: make the gates of a token sum to 1 over its choices: `none`, `before_drop`, or `after_drop` (over the
        assignments that found a slot).
    jitter: see `LinearScores`; Switch used 0.01.
    input_dropout: share of the router's input (not the experts') that is set to zero in training, the rest scaled up.
    sample: in training the K experts are drawn from the softmax over all, one after another without replacement, as the
        highest of logits with Gumbel noise are (Kool et al. 2019, 1903.06059); evaluation takes the best. Gates,
        statistics and losses are those of the logits without the noise, and choices come in the order of the draw.
        The draw has no gradient of its own, as in Switch; `sparse_mixer` estimates one.
        jitter, input_dropout, sample: the three ways of exploration of Switch's table 11.
    second_expert: which choices after the first are used: `all`; `none`; `threshold` (gate share above
        `second_threshold`); `gshard` (with probability min(1, 2 g), GShard's algorithm 1); `mesh_tf` (with
        probability min(1, g / second_threshold)). g is the choice's share of the gates of the token's first two
        choices; in evaluation the random policies keep all.
    init_scale: of the router's weights, see `fan_in_normal`. bias: of the logits, learned (gpt-oss).
    pathway: add what the logits of the sparse layer before say, times a matrix (MoE++); see `Extras`.
    dtype: whose digits the router's input, its weights in use, logits, probabilities and gates are rounded to, and so
        their gradients; parameters, sums of statistics and the gated sum are float32 with either. `bfloat16` is there
        to reproduce Switch's table 2, where it diverges, and for nothing else.
    """

    kind = "top_k"
    takes_free = True

    gate: Literal["softmax_before", "softmax_after"] = "softmax_before"
    renormalise: Literal["none", "before_drop", "after_drop"] = "none"
    jitter: float = option(0.0, ge=0, lt=1)
    input_dropout: float = option(0.0, ge=0, lt=1)
    sample: bool = False
    second_expert: Literal["all", "none", "threshold", "gshard", "mesh_tf"] = "all"
    second_threshold: float = option(0.2, gt=0, le=1)
    init_scale: float = option(0.1, gt=0)
    bias: bool = False
    pathway: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses gates that are constantly 1: the loss of the task would never reach the router."""
        if shape.top_k == 1 and self.gate == "softmax_after":
            raise ConfigError(
                "gate",
                self.gate,
                "with top_k=1 this gate is always 1 and the router learns nothing; use softmax_before",
            )
        if shape.top_k == 1 and self.renormalise != "none":
            raise ConfigError(
                "renormalise",
                self.renormalise,
                "with top_k=1 the gate becomes 1 and the router learns nothing; use none",
            )
        if self.second_expert == "none" and self.renormalise == "after_drop":
            raise ConfigError(
                "renormalise",
                self.renormalise,
                "with second_expert=none the gate becomes 1 and the router learns nothing; use none or before_drop",
            )
        if self.second_expert != "all" and shape.top_k == 1:
            raise ConfigError("second_expert", self.second_expert, "there is no second expert with top_k=1; use all")

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return TopKRouter(key, self, shape, rules)


class TopKRouter(Router):
    """Chooses the K experts with the highest logits, or draws them."""

    def __init__(self, key: jax.Array, config: TopK, shape: RouterShape, rules: Rules):
        self.config, self.top_k, self.rules = config, shape.top_k, rules
        extras = Extras(config.bias, config.pathway)
        self.scores = LinearScores(key, shape, config.init_scale, rules, extras, config.dtype)

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        config = self.config
        jitter_key, policy_key, dropout_key, draw_key = split_keys(key, 4)
        x_GSD = dropout(inputs.x_GSD.astype(jnp.float32), config.input_dropout, dropout_key)
        logits_GSE = self.scores(x_GSD, config.jitter, jitter_key, inputs.carried_GSE)
        probability_GSE = rounded(jax.nn.softmax(logits_GSE, axis=-1), config.dtype)
        expert_GSK = self._chosen(logits_GSE, draw_key)
        if config.gate == "softmax_after":
            chosen_GSK = jnp.take_along_axis(logits_GSE, expert_GSK, axis=-1)
            gate_GSK = rounded(jax.nn.softmax(chosen_GSK, axis=-1), config.dtype)
        else:
            gate_GSK = jnp.take_along_axis(probability_GSE, expert_GSK, axis=-1)
        used_GSK = self._used(gate_GSK, policy_key) & inputs.mask_GS[..., None]
        if config.renormalise == "before_drop":
            # GShard normalises over the candidates, before its policy may leave the second one unused.
            gate_GSK = rounded(gate_GSK / jnp.sum(gate_GSK, axis=-1, keepdims=True), config.dtype)
        decision = TokenChoice(
            expert_GSK=jnp.where(used_GSK, expert_GSK, -1).astype(jnp.int32),
            gate_GSK=jnp.where(used_GSK, gate_GSK, 0.0),
        )
        logsumexp_GS = rounded(jax.nn.logsumexp(logits_GSE, axis=-1), config.dtype)
        carried_GSE = logits_GSE if config.pathway else None
        return decision, Scores(probability_GSE, logsumexp_GS, carried_GSE=carried_GSE)

    def _chosen(self, logits_GSE: jax.Array, key: jax.Array | None) -> jax.Array:
        """The K experts with the highest logits, or K that are drawn; ties go to the lower expert."""
        if self.config.sample and key is not None:
            logits_GSE = logits_GSE + self.rules.draw(jax.random.gumbel, key, logits_GSE.shape, "GSE")
        return jax.lax.top_k(logits_GSE, self.top_k)[1]

    def _used(self, gate_GSK: jax.Array, key: jax.Array | None) -> jax.Array:
        """True for the choices that the policy uses; the first always is."""
        policy = self.config.second_expert
        first_K = jnp.arange(self.top_k) == 0
        if policy == "none":
            return jnp.broadcast_to(first_K, gate_GSK.shape)
        share_GSK = jax.lax.stop_gradient(gate_GSK / jnp.sum(gate_GSK[..., :2], axis=-1, keepdims=True))
        if policy == "threshold":
            return first_K | (share_GSK > self.config.second_threshold)
        if policy == "all" or key is None:
            return jnp.broadcast_to(True, gate_GSK.shape)
        scale = 2.0 if policy == "gshard" else 1.0 / self.config.second_threshold
        uniform_GSK = self.rules.draw(jax.random.uniform, key, gate_GSK.shape, "GSK")
        return first_K | (scale * share_GSK > uniform_GSK)
