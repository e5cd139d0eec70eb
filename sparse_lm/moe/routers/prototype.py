"""Expert prototyping: the experts are split into k prototypes and each token takes the best one of each (M6-T)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import LinearScores, Router, RouterConfig, RouterShape
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Prototype(RouterConfig):
    """Options of "k top-1" routing (Yang et al. 2021, M6-T, section 3.2): y is the sum over the k prototypes.

    Prototype i holds experts i E/k to (i + 1) E/k - 1; the gate is the best probability of a softmax over them alone,
    so that the gates of a token may sum to more than 1. Conventions that the paper leaves open: choices come in the
    order of the prototypes, which share no expert; the statistics (and `balance`) see each prototype's probabilities
    divided by k, and the logsumexp over all experts.

    init_scale: of the router's weights, see `fan_in_normal`; the paper gives none, 0.1 is that of Switch.
    """

    kind = "prototype"
    disjoint = True

    init_scale: float = option(0.1, gt=0)

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses experts that k prototypes cannot share equally, and prototypes of one expert: their gate is 1."""
        if shape.num_experts % shape.top_k:
            raise ConfigError(
                "kind",
                self.kind,
                f"cannot split num_experts={shape.num_experts} into top_k={shape.top_k} equal prototypes; use a "
                "num_experts that is a multiple of top_k",
            )
        if shape.num_experts == shape.top_k:
            raise ConfigError(
                "kind",
                self.kind,
                f"with top_k=num_experts={shape.top_k} each prototype is one expert, its gate is always 1 and the "
                "router learns nothing; use more experts",
            )

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return PrototypeRouter(key, self, shape, rules)


class PrototypeRouter(Router):
    """Chooses the best expert of each of K prototypes."""

    def __init__(self, key: jax.Array, config: Prototype, shape: RouterShape, rules: Rules):
        self.top_k, self.rules = shape.top_k, rules
        self.scores = LinearScores(key, shape, config.init_scale, rules)

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`. There is no noise: training and evaluation route alike."""
        logits_GSE = self.scores(inputs.x_GSD, 0.0, None)
        groups, size, num_experts = logits_GSE.shape
        members = num_experts // self.top_k
        by_prototype = self.rules.reshape(logits_GSE, (groups, size, self.top_k, members), "GSK.")
        probability = jax.nn.softmax(by_prototype, axis=-1)
        gate_GSK1, best_GSK1 = jax.lax.top_k(probability, 1)
        expert_GSK = best_GSK1[..., 0] + jnp.arange(self.top_k) * members
        real_GS1 = inputs.mask_GS[..., None]
        decision = TokenChoice(
            expert_GSK=jnp.where(real_GS1, expert_GSK, -1).astype(jnp.int32),
            gate_GSK=jnp.where(real_GS1, gate_GSK1[..., 0], 0.0),
        )
        probability_GSE = self.rules.reshape(probability, logits_GSE.shape, "GSE") / self.top_k
        return decision, Scores(probability_GSE, jax.nn.logsumexp(logits_GSE, axis=-1))
