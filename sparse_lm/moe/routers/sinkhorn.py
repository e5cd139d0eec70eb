"""S-BASE: a transport plan with equal loads decides in training, the logits decide in evaluation."""

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
class Sinkhorn(RouterConfig):
    """Options of S-BASE routing (Clark et al. 2022).

    In training a token goes to the k experts with the largest entries of the entropy-regularised transport plan, whose
    rows each have mass 1 and whose columns share the group's real tokens equally; in evaluation to those with the
    largest logits. The gate is the softmax probability, not renormalised. Rounding the plan leaves loads a little
    unequal, so capacity still matters; the paper uses a capacity factor of 2 and no balance loss (balance.load=0).

    iterations: of Sinkhorn's algorithm, always as many: convention, where the paper stops at a tolerance, so that the
        result of a group does not depend on others.
    temperature: logits are divided by it for the plan; 1 is the paper's. Smaller is closer to the hard assignment and
        needs more iterations.
    init_scale: of the router's weights, see `fan_in_normal`.
    """

    kind = "sinkhorn"
    causal = False

    iterations: int = option(30, ge=1)
    temperature: float = option(1.0, gt=0)
    init_scale: float = option(0.1, gt=0)

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return SinkhornRouter(key, self, shape, rules)


class SinkhornRouter(Router):
    """Top-k of a balanced plan in training, of the logits in evaluation."""

    def __init__(self, key: jax.Array, config: Sinkhorn, shape: RouterShape, rules: Rules):
        self.config, self.top_k = config, shape.top_k
        self.scores = LinearScores(key, shape, config.init_scale, rules)

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        logits_GSE = self.scores(inputs.x_GSD, 0.0, None)
        probability_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        preference_GSE = jax.lax.stop_gradient(logits_GSE)
        if key is not None:
            plan = log_plan(preference_GSE / self.config.temperature, inputs.mask_GS, self.config.iterations)
            preference_GSE = plan
        expert_GSK = jax.lax.top_k(preference_GSE, self.top_k)[1]
        gate_GSK = jnp.take_along_axis(probability_GSE, expert_GSK, axis=-1)
        real_GS1 = inputs.mask_GS[..., None]
        decision = TokenChoice(
            expert_GSK=jnp.where(real_GS1, expert_GSK, -1).astype(jnp.int32),
            gate_GSK=jnp.where(real_GS1, gate_GSK, 0.0),
        )
        return decision, Scores(probability_GSE, jax.nn.logsumexp(logits_GSE, axis=-1))


def log_plan(logits_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"], iterations: int) -> Float[Array, "G S E"]:
    """Logarithm of diag(u) exp(logits) diag(v): rows sum to 1, and columns of real tokens to (real tokens) / E.

    Columns are scaled first and rows last, so that rows are exact and columns as good as the iterations make them.
    """
    num_experts = logits_GSE.shape[-1]
    real_GS1 = mask_GS[..., None]
    count_G11 = jnp.maximum(jnp.sum(mask_GS, axis=1, dtype=jnp.float32), 1.0)[:, None, None]
    target_G11 = jnp.log(count_G11 / num_experts)

    def body(plan_GSE, _):
        # A finite number in the place of -inf keeps groups of padding alone free of inf - inf.
        column_G1E = jax.nn.logsumexp(jnp.where(real_GS1, plan_GSE, -1e9), axis=1, keepdims=True)
        plan_GSE = plan_GSE + (target_G11 - column_G1E)
        return plan_GSE - jax.nn.logsumexp(plan_GSE, axis=2, keepdims=True), None

    start_GSE = logits_GSE - jax.nn.logsumexp(logits_GSE, axis=2, keepdims=True)
    return jax.lax.scan(body, start_GSE, length=iterations)[0]
