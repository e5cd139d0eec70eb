"""SparseMixer: one expert after another is drawn, and the gradient of the draw is estimated (Phi-3.5-MoE's router)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import LinearScores, Router, RouterConfig, RouterShape
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice
from sparse_lm.nn.dropout import split_keys
from sparse_lm.sharding import Rules

WHOLE, THIRD = 0.25, 0.75  # how often a gate is whole and how often a third: Heun's third-order weights


@dataclasses.dataclass(frozen=True)
class SparseMixer(RouterConfig):
    """Options of SparseMixer (Liu et al. 2023, 2310.00811), in the form with several experts of Phi-3.5-MoE.

    Choices are made one after another, among the experts that are left. Candidates are those whose logit is at most
    2 * jitter below the highest, relative to the larger of the highest and the magnitude of the expert's own logit.
    In training one of the candidates is drawn from the softmax over them, in evaluation the best is taken. The gate is
    the probability of the chosen among the candidates, not renormalised: the gates of a token may sum to k, and a
    choice without an alternative has gate 1 and no gradient.

    The gradient that the draw needs and backpropagation does not see is the integral of the gate's effect from 0 to its
    value, by Heun's third-order rule 1/4 f'(1) + 3/4 f'(1/3) with one evaluation: in training the gate of an expert
    that is not the most likely candidate is multiplied by 1/3 with probability 3/4, while its gradient is always that
    of the whole gate. The most likely candidate's gate stays whole. Both as published in the code of Phi-3.5-MoE.

    jitter: half the relative distance to the best that a candidate may have; Phi-3.5-MoE has 0.01. The larger it is,
        the more tokens have an alternative, and the more of them teach the router. Conventions: k may be any number
        below num_experts (published: 1 and 2), and the input of the layer is not jittered.
    init_scale: of the router's weights, see `fan_in_normal`.
    The balance losses and the statistics see the softmax over all experts.
    """

    kind = "sparse_mixer"
    takes_free = True

    jitter: float = option(0.01, gt=0)
    init_scale: float = option(0.1, gt=0)

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses k = E: the last choice has no alternative, its gate is 1 and teaches the router nothing."""
        if shape.top_k == shape.num_experts:
            raise ConfigError(
                "kind",
                self.kind,
                f"with top_k=num_experts={shape.top_k} the last choice has no alternative and its gate is always 1; "
                "use more experts or a smaller top_k",
            )

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return SparseMixerRouter(key, self, shape, rules)


class SparseMixerRouter(Router):
    """Draws K experts one after another."""

    def __init__(self, key: jax.Array, config: SparseMixer, shape: RouterShape, rules: Rules):
        self.config, self.top_k, self.rules = config, shape.top_k, rules
        self.scores = LinearScores(key, shape, config.init_scale, rules)

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        logits_GSE = self.scores(inputs.x_GSD, 0.0, None)
        free_GSE = jnp.ones_like(logits_GSE, bool)
        experts, gates = [], []
        for choice_key in split_keys(key, self.top_k):
            candidate_GSE = candidates(jax.lax.stop_gradient(logits_GSE), free_GSE, self.config.jitter)
            masked_GSE = jnp.where(candidate_GSE, logits_GSE, -jnp.inf)
            probability_GSE = jax.nn.softmax(masked_GSE, axis=-1)
            expert_GS, share_GS = self._drawn(jax.lax.stop_gradient(masked_GSE), choice_key)
            gate_GS1 = jnp.take_along_axis(probability_GSE, expert_GS[..., None], axis=-1)
            experts.append(expert_GS)
            gates.append(estimated(gate_GS1[..., 0], share_GS))
            free_GSE &= ~jax.nn.one_hot(expert_GS, logits_GSE.shape[-1], dtype=bool)
        real_GS1 = inputs.mask_GS[..., None]
        decision = TokenChoice(
            expert_GSK=jnp.where(real_GS1, jnp.stack(experts, axis=-1), -1).astype(jnp.int32),
            gate_GSK=jnp.where(real_GS1, jnp.stack(gates, axis=-1), 0.0),
        )
        return decision, Scores(jax.nn.softmax(logits_GSE, axis=-1), jax.nn.logsumexp(logits_GSE, axis=-1))

    def _drawn(self, masked_GSE: jax.Array, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """The chosen expert, and the share of its gate that this pass uses."""
        best_GS = jnp.argmax(masked_GSE, axis=-1)
        if key is None:
            return best_GS, jnp.ones_like(masked_GSE[..., 0])
        draw_key, share_key = jax.random.split(key)
        noise_GSE = self.rules.draw(jax.random.gumbel, draw_key, masked_GSE.shape, "GSE")
        expert_GS = jnp.argmax(masked_GSE + noise_GSE, axis=-1)
        whole_GS = self.rules.draw(jax.random.uniform, share_key, best_GS.shape, "GS") < WHOLE
        return expert_GS, jnp.where((expert_GS == best_GS) | whole_GS, 1.0, 1 / 3)


def candidates(
    logits_GSE: Float[Array, "G S E"], free_GSE: Bool[Array, "G S E"], jitter: float
) -> Bool[Array, "G S E"]:
    """True for the free experts whose logit is at most 2 * jitter * max(best, |logit|) below the best free one."""
    best_GS1 = jnp.max(logits_GSE, axis=-1, keepdims=True, where=free_GSE, initial=-jnp.inf)
    return free_GSE & (best_GS1 - logits_GSE <= 2 * jitter * jnp.maximum(jnp.abs(logits_GSE), best_GS1))


def estimated(gate_GS: Float[Array, "G S"], share_GS: Float[Array, "G S"]) -> Float[Array, "G S"]:
    """A share of the gate whose gradient is that of the whole gate."""
    return jax.lax.stop_gradient(gate_GS * share_GS) + (gate_GS - jax.lax.stop_gradient(gate_GS))
