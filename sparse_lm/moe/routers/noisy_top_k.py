"""Noisy top-k gating: learned noise on the logits, softmax over the best k (Shazeer et al. 2017)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import LinearScores, Router, RouterConfig, RouterShape
from sparse_lm.moe.routers.cv_losses import CvLosses, chance_of_top_k, chosen
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class NoisyTopK(RouterConfig):
    """Options of noisy top-k gating: softmax over the k highest of x W + normal * softplus(x W_noise); 2.1, eq. 3 to 5.

    importance, load: weights of the two balance losses (section 4, appendix A), which take the place of the
        load-balance loss of `balance`: set `balance.load` and `balance.z` to 0 for the paper. They are per routing
        group, where the paper has a whole batch: see `cv_losses`. Importance sums the gates, load the chance of each
        expert to be chosen if its own noise were drawn again; in evaluation there is no noise and it is the count.
    noise_floor: added to the noise's standard deviation. Equation 4 has none; the authors' Tensor2Tensor adds 0.01,
        which keeps the load loss finite.
    init_scale: of both matrices, see `fan_in_normal`; 0 as in appendix A: all experts start equally likely.
    Statistics (and `balance`) see the softmax of the noisy logits over all experts.
    """

    kind = "noisy_top_k"
    takes_free = True

    importance: float = option(0.1, ge=0)
    load: float = option(0.1, ge=0)
    noise_floor: float = option(0.01, gt=0)
    init_scale: float = option(0.0, ge=0)

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses k = 1: a softmax over one logit is 1, and the loss of the task would never reach the router."""
        if shape.top_k == 1:
            raise ConfigError(
                "kind",
                self.kind,
                "with top_k=1 its gate is always 1 and the router learns nothing; use top_k=2 or more, or fixed_noise",
            )

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return NoisyTopKRouter(key, self, shape, rules)


class NoisyTopKRouter(Router):
    """Chooses the K experts with the highest noisy logits."""

    def __init__(self, key: jax.Array, config: NoisyTopK, shape: RouterShape, rules: Rules):
        clean, noise = jax.random.split(key)
        self.config, self.top_k, self.rules = config, shape.top_k, rules
        self.scores = LinearScores(clean, shape, config.init_scale, rules)
        sizes = (shape.d_model, shape.num_experts)
        self.noise_DE = nnx.Param(fan_in_normal(noise, sizes, shape.d_model, config.init_scale))

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        config = self.config
        clean_GSE = self.scores(inputs.x_GSD, 0.0, None)
        noisy_GSE, std_GSE = clean_GSE, None
        if key is not None:
            x_GSD = inputs.x_GSD.astype(jnp.float32)
            raw_GSE = self.rules.einsum("GSD,DE->GSE", x_GSD, self.rules.whole(self.noise_DE[...]))
            std_GSE = jax.nn.softplus(raw_GSE) + config.noise_floor
            noisy_GSE = clean_GSE + std_GSE * self.rules.draw(jax.random.normal, key, clean_GSE.shape, "GSE")
        best_GSK, expert_GSK = jax.lax.top_k(noisy_GSE, self.top_k)
        gate_GSK = jax.nn.softmax(best_GSK, axis=-1)
        num_experts = clean_GSE.shape[-1]
        if std_GSE is None:
            load_GSE = chosen(expert_GSK, 1.0, num_experts)
        else:
            load_GSE = chance_of_top_k(clean_GSE, noisy_GSE, std_GSE, self.top_k, "one")
        losses = CvLosses(config.importance, config.load)
        penalty_GS = losses.penalty(chosen(expert_GSK, gate_GSK, num_experts), load_GSE, inputs.mask_GS)
        real_GS1 = inputs.mask_GS[..., None]
        decision = TokenChoice(
            expert_GSK=jnp.where(real_GS1, expert_GSK, -1).astype(jnp.int32),
            gate_GSK=jnp.where(real_GS1, gate_GSK, 0.0),
        )
        probability_GSE = jax.nn.softmax(noisy_GSE, axis=-1)
        return decision, Scores(probability_GSE, jax.nn.logsumexp(noisy_GSE, axis=-1), penalty_GS)
