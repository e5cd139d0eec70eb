"""Expert choice: experts choose tokens, so that every expert is equally loaded and tokens get as many as want them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparse_lm.config import ConfigError, option
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
    max_experts: at most b experts per token (section 3.3), a promise; None is no limit. Experts take the tokens with
        the highest entries of A (see `log_assignment`), gates stay the scores. A is a relaxation: after rounding it, a
        token may still be with more than b experts. Convention: it then keeps the b that score it highest, and the
        slots of the others stay empty; so they do where b is under capacity_factor * top_k.
    entropy, iterations: the weight lambda of the entropy, and how often each constraint is imposed; read with
        max_experts alone. The smaller lambda, the closer is A to whole numbers, and the more iterations it takes: the
        paper's 0.001 needs thousands, and with a hundred the limit is hardly felt before the last rule enforces it.
    """

    kind = "expert_choice"
    causal = False
    needs_slots = True

    init_scale: float = option(0.1, gt=0)
    max_experts: int | None = option(None, ge=1)
    entropy: float = option(0.01, gt=0)
    iterations: int = option(100, ge=1)

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses a limit that limits nothing."""
        if self.max_experts is not None and self.max_experts >= shape.num_experts:
            raise ConfigError(
                "max_experts",
                self.max_experts,
                f"no token can be with more than num_experts={shape.num_experts}; set it lower, or to None",
            )

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return ExpertChoiceRouter(key, self, shape, rules)


class ExpertChoiceRouter(Router):
    """Gives each expert the tokens that it scores highest; decisions have K = E."""

    def __init__(self, key: jax.Array, config: ExpertChoice, shape: RouterShape, rules: Rules):
        self.config = config
        self.scores = LinearScores(key, shape, config.init_scale, rules)

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        logits_GSE = self.scores(inputs.x_GSD, 0.0, None)
        probability_GSE = jax.nn.softmax(logits_GSE, axis=-1)
        taken_GSE = self.scores.rules.per_group(
            lambda score, mask: self._taken(score, mask, inputs.slots),
            jax.lax.stop_gradient(probability_GSE),
            inputs.mask_GS,
        )
        expert_E = jnp.arange(probability_GSE.shape[-1], dtype=jnp.int32)
        decision = TokenChoice(
            expert_GSK=jnp.where(taken_GSE, expert_E, -1),
            gate_GSK=jnp.where(taken_GSE, probability_GSE, 0.0),
        )
        return decision, Scores(probability_GSE, jax.nn.logsumexp(logits_GSE, axis=-1))

    def _taken(self, score_GSE: jax.Array, mask_GS: jax.Array, slots: int) -> jax.Array:
        limit = self.config.max_experts
        if limit is None:
            return highest(score_GSE, mask_GS, slots)
        rule = Assignment(slots, limit, self.config.entropy, self.config.iterations)
        taken_GSE = highest(log_assignment(score_GSE, mask_GS, rule), mask_GS, slots)
        return taken_GSE & _first(jnp.where(taken_GSE, -score_GSE, jnp.inf), limit, axis=2)


def highest(score_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"], slots: int) -> Bool[Array, "G S E"]:
    """True for the `slots` real tokens with the highest scores of each expert; all of them where there are fewer."""
    return _first(jnp.where(mask_GS[..., None], -score_GSE, jnp.inf), slots, axis=1) & mask_GS[..., None]


def _first(x: jax.Array, number: int, axis: int) -> jax.Array:
    """True for the `number` lowest values along an axis; ties go to the earlier one."""
    order = jnp.argsort(x, axis=axis, stable=True)
    return jnp.argsort(order, axis=axis, stable=True) < number


@dataclasses.dataclass(frozen=True)
class Assignment:
    """What is asked of the assignment A: see `log_assignment`."""

    slots: int
    max_experts: int
    entropy: float
    iterations: int


def log_assignment(
    score_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"], rule: Assignment
) -> Float[Array, "G S E"]:
    """The A that maximises <score, A> + entropy * H(A), as a logarithm that is not cut off at 0 where A is 1.

    Each expert has `slots` tokens, a token at most `max_experts` experts, and 0 <= A <= 1; H is the sum of -A log A. By
    Dykstra's alternating projections in the Kullback-Leibler divergence (Benamou et al. 2015, section 3), always as
    many iterations. Their corrections are at most 0, and where one is below, its constraint binds. Where real tokens
    are too few for the slots of all experts, the experts share what the limit leaves equally. Uncut, the
    values of entries that are 1 still say which expert wants the token most, so that sorting has no ties.
    """
    num_experts = score_GSE.shape[-1]
    real_G11 = jnp.maximum(jnp.sum(mask_GS, axis=1, dtype=jnp.float32), 1.0)[:, None, None]
    room_G11 = real_G11 * rule.max_experts / num_experts
    log_slots_G11, log_limit = jnp.log(jnp.minimum(rule.slots, room_G11)), jnp.log(jnp.float32(rule.max_experts))

    def body(state, _):
        a_GSE, by_token_GS1, by_entry_GSE = state
        a_GSE = a_GSE + log_slots_G11 - jax.nn.logsumexp(a_GSE, axis=1, keepdims=True)
        a_GSE = a_GSE - by_token_GS1
        by_token_GS1 = jnp.minimum(log_limit - jax.nn.logsumexp(a_GSE, axis=2, keepdims=True), 0.0)
        a_GSE = a_GSE + by_token_GS1 - by_entry_GSE
        by_entry_GSE = jnp.minimum(-a_GSE, 0.0)
        return (a_GSE + by_entry_GSE, by_token_GS1, by_entry_GSE), None

    # A finite number in the place of -inf keeps groups of padding alone free of inf - inf.
    start_GSE = jnp.where(mask_GS[..., None], score_GSE / rule.entropy, -1e9)
    zero_GSE = jnp.zeros_like(start_GSE)
    (a_GSE, _, by_entry_GSE), _ = jax.lax.scan(body, (start_GSE, zero_GSE[..., :1], zero_GSE), length=rule.iterations)
    return a_GSE - by_entry_GSE
