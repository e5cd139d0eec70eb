"""Vision-MoE routing: noise of a fixed size on the logits, softmax before top-k (Riquelme et al. 2021)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.config import option
from sparse_lm.moe.routers.base import LinearScores, Router, RouterConfig, RouterShape
from sparse_lm.moe.routers.cv_losses import CvLosses, chance_of_top_k, chosen
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class FixedNoise(RouterConfig):
    """Options of V-MoE's router: the k highest of softmax(x W + N(0, (noise / E)^2)), not renormalised (section 2.1).

    noise: in training; its standard deviation is noise / E. 0 is none: the load is then the count, without a gradient.
    importance, load: weights of the two balance losses (appendix A), which take the place of the load-balance loss of
        `balance`: set `balance.load` and `balance.z` to 0 for the paper. They are per routing group: see `cv_losses`.
        Importance sums the softmax of the logits without noise. The threshold of the load is the k-th highest noisy
        logit, the expert's own included, as in the authors' code.
    init_scale: of the router's weights, see `fan_in_normal`; the authors' code has 1.
    Statistics (and `balance`) see the softmax of the noisy logits.
    """

    kind = "fixed_noise"
    takes_free = True

    noise: float = option(1.0, ge=0)
    importance: float = option(0.005, ge=0)
    load: float = option(0.005, ge=0)
    init_scale: float = option(1.0, gt=0)

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return FixedNoiseRouter(key, self, shape, rules)


class FixedNoiseRouter(Router):
    """Chooses the K experts with the highest noisy logits."""

    def __init__(self, key: jax.Array, config: FixedNoise, shape: RouterShape, rules: Rules):
        self.config, self.top_k, self.rules = config, shape.top_k, rules
        self.scores = LinearScores(key, shape, config.init_scale, rules)

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        config = self.config
        clean_GSE = self.scores(inputs.x_GSD, 0.0, None)
        num_experts = clean_GSE.shape[-1]
        std = 0.0 if key is None else config.noise / num_experts
        noisy_GSE = clean_GSE
        if key is not None and std > 0:
            noisy_GSE = clean_GSE + std * self.rules.draw(jax.random.normal, key, clean_GSE.shape, "GSE")
        probability_GSE = jax.nn.softmax(noisy_GSE, axis=-1)
        gate_GSK, expert_GSK = jax.lax.top_k(probability_GSE, self.top_k)
        if std > 0:
            load_GSE = chance_of_top_k(clean_GSE, noisy_GSE, std, self.top_k, "all")
        else:
            load_GSE = chosen(expert_GSK, 1.0, num_experts)
        losses = CvLosses(config.importance, config.load)
        penalty_GS = losses.penalty(jax.nn.softmax(clean_GSE, axis=-1), load_GSE, inputs.mask_GS)
        real_GS1 = inputs.mask_GS[..., None]
        decision = TokenChoice(
            expert_GSK=jnp.where(real_GS1, expert_GSK, -1).astype(jnp.int32),
            gate_GSK=jnp.where(real_GS1, gate_GSK, 0.0),
        )
        return decision, Scores(probability_GSE, jax.nn.logsumexp(noisy_GSE, axis=-1), penalty_GS)
