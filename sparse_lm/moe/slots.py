"""Who gets a place: capacity, drop priority, and the slot of every assignment. All of it is local to a group."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from sparse_lm.moe.grouped import before
from sparse_lm.moe.types import TokenChoice

Priority = Literal["first_choice", "token", "probability", "batch", "random"]
PRIORITIES = get_args(Priority)


def capacity(factor: float | None, top_k: int, group_size: int, num_experts: float) -> int:
    """Slots of an expert per group: ceil(factor * k * S / E), at most S, since a token takes an expert once.

    num_experts: with free experts beside, `MoEConfig.worth`. factor: None gives S: nothing can be dropped.
    Convention: k is included (V-MoE, Megatron; not Mesh-TensorFlow, flaxformer), rounded up.
    """
    if factor is None:
        return group_size
    # The product is rounded before the ceiling, so that 1.1 * 2 * 100 / 4 is 55 and not 56 by a rounding error.
    exact = round(factor * top_k * group_size / num_experts, 6)
    return min(group_size, max(1, math.ceil(exact)))


@dataclasses.dataclass(frozen=True)
class SlotRule:
    """Slots per expert, who gets them first, and whether the gates are renormalised over what was kept."""

    capacity: int
    priority: Priority = "first_choice"
    renormalise: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Placement:
    """Where every assignment of a shard's groups goes.

    slot_GSK: index of the slot within its expert's C slots of the group; -1 is dropped or no expert.
    gate_GSK: float32 weights of the experts' outputs, 0 where there is no slot.
    token_GEC: the token (0..S-1) in each slot; -1 is an empty slot.
    scale_GSK: float32 weights of the experts' inputs, 0 where there is no slot; None is 1 for all.
    """

    slot_GSK: Int[Array, "G S K"]
    gate_GSK: jax.Array
    token_GEC: Int[Array, "G E C"]
    scale_GSK: jax.Array | None = None

    @classmethod
    def of(cls, decision: TokenChoice, slot_GSK: jax.Array, gate_GSK: jax.Array, token_GEC: jax.Array) -> Placement:
        """With the gates, 0 where there is no slot, on that side of the experts where the decision wants them."""
        if decision.gate_on == "input":
            return cls(slot_GSK, (slot_GSK >= 0).astype(jnp.float32), token_GEC, gate_GSK)
        return cls(slot_GSK, gate_GSK, token_GEC)


def place(decision: TokenChoice, num_experts: int, rule: SlotRule) -> Placement:
    """Gives the slots of every expert to assignments in the order of the rule's priority.

    first_choice: all first choices by token, then all second choices (GShard algorithm 1, Switch).
    token: by token, all its choices together (MaxText, MegaBlocks).
    probability: by gate, highest first, ties by first_choice order (Megatron's `probs`). Not causal.
    batch: all first choices by the largest gate of their token, highest first, then all second choices; ties by token
        (batch-prioritised routing: Riquelme et al. 2021, section 4.1). Not causal.
    random: by `decision.order_GS`, lowest first, all choices of a token together (DeepSpeed's random token selection,
        which has k = 1); by token where there is no order, as in evaluation. Not causal.

    A sort by (expert, order) puts the assignments of an expert side by side, so that both directions of the map are
    gathers; nothing of size S x E x C is made.
    """
    groups, size, top_k = decision.expert_GSK.shape
    gate_GSK = decision.gate_GSK
    by_token = rule.priority in ("token", "random")
    if by_token:
        expert_GA, token_A = decision.expert_GSK.reshape(groups, size * top_k), jnp.arange(size * top_k) // top_k
    else:
        expert_GA, token_A = _choices_first(decision.expert_GSK), jnp.arange(size * top_k) % size
    # Assignments without an expert sort behind all others.
    expert_GA = jnp.where(expert_GA < 0, num_experts, expert_GA)
    if rule.priority == "probability":
        gate_GA = _choices_first(jax.lax.stop_gradient(gate_GSK))
        order_GA = jnp.lexsort((-gate_GA, expert_GA), axis=-1)
    elif rule.priority == "batch":
        largest_GS = jnp.max(jax.lax.stop_gradient(gate_GSK), axis=-1)
        expert_and_choice_GA = expert_GA * top_k + jnp.arange(size * top_k) // size
        order_GA = jnp.lexsort((-jnp.tile(largest_GS, (1, top_k)), expert_and_choice_GA), axis=-1)
    elif rule.priority == "random" and decision.order_GS is not None:
        order_GA = jnp.lexsort((jnp.repeat(decision.order_GS, top_k, axis=1), expert_GA), axis=-1)
    else:
        order_GA = jnp.argsort(expert_GA, axis=-1, stable=True)
    count_GE = jnp.sum(expert_GA[..., None] == jnp.arange(num_experts), axis=1, dtype=jnp.int32)
    start_GE = before(count_GE, axis=-1)
    # The slot of an assignment is its rank in the sorted order, counted from its expert's start.
    rank_GA = jnp.argsort(order_GA, axis=-1)
    start_GA = jnp.take_along_axis(start_GE, jnp.minimum(expert_GA, num_experts - 1), axis=-1)
    slot_GA = rank_GA - start_GA
    slot_GA = jnp.where((expert_GA < num_experts) & (slot_GA < rule.capacity), slot_GA, -1).astype(jnp.int32)

    slots_C = jnp.arange(rule.capacity)
    sorted_GEC = jnp.minimum(start_GE[..., None] + slots_C, size * top_k - 1)
    taken_GEC = slots_C < count_GE[..., None]
    chosen_GEC = jnp.take_along_axis(order_GA, sorted_GEC.reshape(groups, -1), axis=-1).reshape(sorted_GEC.shape)
    token_GEC = jnp.where(taken_GEC, token_A[chosen_GEC], -1).astype(jnp.int32)

    if by_token:
        slot_GSK = slot_GA.reshape(groups, size, top_k)
    else:
        slot_GSK = jnp.swapaxes(slot_GA.reshape(groups, top_k, size), 1, 2)
    gate_GSK = jnp.where(slot_GSK >= 0, gate_GSK, 0.0)
    if rule.renormalise:
        total_GS1 = jnp.sum(gate_GSK, axis=-1, keepdims=True)
        gate_GSK = gate_GSK / jnp.where(total_GS1 > 0, total_GS1, 1.0)
    return Placement.of(decision, slot_GSK, gate_GSK, token_GEC)


def _choices_first(x_GSK: jax.Array) -> jax.Array:
    """[G, S, K] -> [G, K * S]: all first choices, then all second ones."""
    return jnp.swapaxes(x_GSK, 1, 2).reshape(x_GSK.shape[0], -1)
