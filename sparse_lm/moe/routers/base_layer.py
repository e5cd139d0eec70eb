"""BASE layers: in training every expert gets equally many tokens, by an optimal assignment."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparse_lm.config import ConfigError, option
from sparse_lm.moe.routers.base import LinearScores, Router, RouterConfig, RouterShape
from sparse_lm.moe.types import RouterInputs, Scores, TokenChoice
from sparse_lm.sharding import Rules


@dataclasses.dataclass(frozen=True)
class Base(RouterConfig):
    """Options of BASE layers (Lewis et al. 2021, section 3).

    In training the assignment of a group's tokens to experts maximises the sum of the affinities h.w_e under at most
    ceil(S / E) tokens per expert, so exactly S / E where E divides S and nothing is padding; in evaluation each token
    goes to its expert with the largest affinity. It is solved exactly, where the paper uses an auction that stops short
    of the optimum by a tolerance; the time grows with the tokens that cannot get their favourite, one step each.

    The gate is alpha = sigmoid(h.w_e). The paper's output is alpha * expert(h) + (1 - alpha) * h; ours is
    alpha * expert(h), and the block adds its residual. The paper has no balance loss: set balance.load and balance.z
    to 0. Nothing is dropped in training from capacity_factor=1 on, nor in evaluation with capacity_factor_eval=None.

    gain: of the orthogonal initial centroids; 0.1 is the released code's.
    """

    kind = "base"
    causal = False

    gain: float = option(0.1, gt=0)

    def check_shape(self, shape: RouterShape) -> None:
        """Refuses several experts per token, for which the paper has no assignment."""
        if shape.top_k != 1:
            raise ConfigError("kind", self.kind, f"assigns one expert per token; top_k={shape.top_k} must be 1")

    def build(self, key: jax.Array, shape: RouterShape, rules: Rules) -> Router:
        """See `RouterConfig.build`."""
        return BaseRouter(key, self, shape, rules)


class BaseRouter(Router):
    """The optimal balanced assignment in training, the best expert in evaluation."""

    def __init__(self, key: jax.Array, config: Base, shape: RouterShape, rules: Rules):
        self.scores = LinearScores(key, shape, config.gain, rules)
        self.scores.weight_DE[...] = jax.nn.initializers.orthogonal(config.gain)(key, self.scores.weight_DE.shape)

    def __call__(self, inputs: RouterInputs, key: jax.Array | None) -> tuple[TokenChoice, Scores]:
        """See `Router`."""
        affinity_GSE = self.scores(inputs.x_GSD, 0.0, None)
        if key is None:
            expert_GS = jnp.argmax(affinity_GSE, axis=-1).astype(jnp.int32)
            expert_GS = jnp.where(inputs.mask_GS, expert_GS, -1)
        else:
            fixed_GSE = jax.lax.stop_gradient(affinity_GSE)
            expert_GS = self.scores.rules.per_group(balanced_assignment, fixed_GSE, inputs.mask_GS)
        chosen_GSE = expert_GS[..., None] == jnp.arange(affinity_GSE.shape[-1])
        # Of all affinities, since a gather along E and a sum over E cost the same and this one is 0 for padding.
        gate_GS = jnp.sum(jnp.where(chosen_GSE, jax.nn.sigmoid(affinity_GSE), 0.0), axis=-1)
        probability_GSE = jax.nn.softmax(affinity_GSE, axis=-1)
        scores = Scores(probability_GSE, jax.nn.logsumexp(affinity_GSE, axis=-1))
        return TokenChoice(expert_GS[..., None], gate_GS[..., None]), scores


def balanced_assignment(affinity_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]) -> Int[Array, "G S"]:
    """The expert of each token, -1 for padding: the largest sum of affinities with at most ceil(S / E) per expert.

    Successive shortest paths, on a graph of the experts alone: every token starts at its favourite, which is optimal
    but for the bound; then, as long as an expert has too many, the cheapest chain of moves from one with too many to
    one with room is made, each link moving the token that loses least. That keeps the assignment optimal for its
    loads, and takes as many steps as tokens are too many. Float32 affinities that differ by rounding count as equal.
    """
    size, num_experts = affinity_GSE.shape[1:]
    room = -(-size // num_experts)
    first_GS = jnp.where(mask_GS, jnp.argmax(affinity_GSE, axis=-1), -1).astype(jnp.int32)

    def loads(expert_GS):
        return jnp.sum(expert_GS[..., None] == jnp.arange(num_experts), axis=1, dtype=jnp.int32)

    def unbalanced(carry):
        step, expert_GS = carry
        # A step per surplus token is enough; the bound keeps a NaN from running forever.
        return jnp.any(loads(expert_GS) > room) & (step < size)

    def body(carry):
        step, expert_GS = carry
        return step + 1, jax.vmap(_move, (0, 0, 0, None))(affinity_GSE, expert_GS, loads(expert_GS), room)

    return jax.lax.while_loop(unbalanced, body, (0, first_GS))[1]


def _move(affinity_SE, expert_S, load_E, room: int):
    """The cheapest chain of moves that takes a token off some expert with too many; nothing where none has."""
    size, num_experts = affinity_SE.shape
    own_SE = expert_S[:, None] == jnp.arange(num_experts)
    current_S1 = jnp.sum(jnp.where(own_SE, affinity_SE, 0.0), axis=1, keepdims=True)
    # loss_EE[e, f]: the least that a token of e loses when it moves to f. Padding belongs to no expert.
    segment_S = jnp.where(expert_S >= 0, expert_S, num_experts)
    loss_SE = current_S1 - affinity_SE
    loss_EE = jax.ops.segment_min(loss_SE, segment_S, num_experts + 1)[:num_experts]
    crowded_E, open_E = load_E > room, load_E < room

    def relax(cost_E, _):
        # Layer by layer, so that a chain has at most one link per layer and cannot run in circles.
        through_EE = cost_E[:, None] + loss_EE
        best_E = jnp.min(through_EE, axis=0)
        better_E = best_E < cost_E
        return jnp.where(better_E, best_E, cost_E), jnp.where(better_E, jnp.argmin(through_EE, axis=0), -1)

    start_E = jnp.where(crowded_E, 0.0, jnp.inf) + 0.0 * affinity_SE[0]
    cost_E, parent_NE = jax.lax.scan(relax, start_E, length=num_experts - 1) if num_experts > 1 else (start_E, None)
    if parent_NE is None:
        return expert_S
    goal = jnp.argmin(jnp.where(open_E, cost_E, jnp.inf))
    possible = jnp.any(crowded_E) & jnp.isfinite(cost_E[goal])

    def back(carry, parent_E):
        expert_S, here = carry
        before = parent_E[here]
        moves = possible & (before >= 0)
        token = jnp.argmin(jnp.where(segment_S == before, loss_SE[:, here], jnp.inf))
        moved_S = jnp.where((jnp.arange(size) == token) & moves, here, expert_S).astype(jnp.int32)
        return (moved_S, jnp.where(moves, before, here)), None

    (expert_S, _), _ = jax.lax.scan(back, (expert_S, goal), parent_NE, reverse=True)
    return expert_S
