"""Expert choice: experts choose tokens, so that every expert is equally loaded and tokens get as many as want them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_lm.config import option
from sparse_lm.moe.routers.base import LinearScores, Router, RouterConfig, RouterShape
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class ExpertChoice(RouterConfig):
    """Options of expert choice (Zhou et al. 2022).

    Scores are a softmax over the experts; each expert takes the tokens of its group with the highest scores (ties: the
    earlier token), as many as it has slots; the gate is the score. The paper's capacity c, the mean number of experts
    per token, is capacity_factor * top_k: top_k=2 with both capacity factors 1 is its default. A token is offered to
    all experts, so that the statistics count E choices per token, the refused ones as declined. There are no drops,
    and the paper has no balance loss: set balance.load and balance.z to 0.

    An expert compares a token with later ones: with grouping=sequence it sees the future. With grouping=position it
    compares tokens at the same position of different rows, which is causal.

    init_scale: of the router's weights, see `fan_in_normal`.
    """

    kind = "expert_choice"
    causal = False
    needs_slots = True

    init_scale: float = option(0.1, gt=0)

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return ExpertChoiceRouter(key, self, shape, rules)


class ExpertChoiceRouter(Router):
    """Gives each expert the tokens that it scores highest; decisions have K = E."""

    def __init__(self, key: jax.Array, config: ExpertChoice, shape: RouterShape, rules: Rules):
        self.scores = LinearScores(key, shape, config.init_scale, rules)

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        logits_GSE = self.scores(inputs.x_GSD, 0.0, None)
        probability_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        taken_GSE = self.scores.rules.per_group(
            lambda score, mask: highest(score, mask, inputs.slots),
            jax.lax.stop_gradient(probability_GSE),
            inputs.mask_GS,
        )
        expert_E = jnp.arange(probability_GSE.shape[-1], dtype=jnp.int32)
        decision = TokenChoice(
            expert_GSK=jnp.where(taken_GSE, expert_E, -1),
            gate_GSK=jnp.where(taken_GSE, probability_GSE, 0.0),
        )
        return decision, Scores(probability_GSE, jax.nn.logsumexp(logits_GSE, axis=-1))


def highest(score_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"], slots: int) -> Bool[Array, "G S E"]:
    """True for the `slots` real tokens with the highest scores of each expert; all of them where there are fewer."""
    order_GSE = jnp.argsort(jnp.where(mask_GS[..., None], -score_GSE, jnp.inf), axis=1, stable=True)
    rank_GSE = jnp.argsort(order_GSE, axis=1, stable=True)
    return (rank_GSE < slots) & mask_GS[..., None]
