"""What routers, dispatchers and losses say to each other: data, never behaviour."""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HISTOGRAM_BINS = 20
POSITION_BINS = 16


@typing.dataclass_transform(frozen_default=True)
def pytree_dataclass(cls):
    """A frozen dataclass that is a pytree of its fields."""
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree_dataclass
class RouterInputs:
    """What a router may look at: G groups of S tokens. G may be cut over devices and S never is.

    x_GSD: activations. mask_GS: False is padding, which gets no expert. ids_GS: token ids. slots: how many tokens of a
    group an expert takes, for routers that fill them (the others may choose as they like; what is too much is dropped).
    previous_GS: id of the token before in the same document, -1 where there is none; None is -1 everywhere.
    carried_GSE: what the sparse layer before handed on (`Scores.carried_GSE`), 0 in the first; None where none does.
    """

    x_GSD: Float[Array, "G S D"]
    mask_GS: Bool[Array, "G S"]
    ids_GS: Int[Array, "G S"]
    slots: int = dataclasses.field(metadata={"static": True})
    previous_GS: Int[Array, "G S"] | None = None
    carried_GSE: Float[Array, "G S E"] | None = None


@pytree_dataclass
class TokenChoice:
    """Which experts each token goes to, at most K; whether tokens chose experts or experts chose tokens.

    expert_GSK: the experts, first choice first; -1 is none (padding, or a choice the router declined).
    gate_GSK: the weight in the token's output, float32, before any drop; 0 where there is no expert.
    order_GS: who gets a slot first, lowest first, where the priority is `random`; None is by token. Routers leave it.
    gate_on: whether the gate multiplies the expert's `output`, or its `input` (Llama 4).
    """

    expert_GSK: Int[Array, "*N G S K"]
    gate_GSK: Float[Array, "*N G S K"]
    order_GS: Float[Array, "*N G S"] | None = None
    gate_on: Literal["output", "input"] = dataclasses.field(default="output", metadata={"static": True})


@pytree_dataclass
class Soft:
    """Weights of tokens in slots and of slots in tokens: nothing is chosen (Soft MoE).

    dispatch_GSEC: of each token in each slot's input, a sum of 1 over the tokens. combine_GSEC: of each slot's output
    in each token, a sum of 1 over all slots. float32; 0 for padding.
    """

    dispatch_GSEC: Float[Array, "G S E C"]
    combine_GSEC: Float[Array, "G S E C"]

    def choices(self, mask_GS: Bool[Array, "G S"]) -> TokenChoice:
        """The same to count by: every real token with every expert; gates are its weights, summed over slots."""
        experts_E = jnp.arange(self.combine_GSEC.shape[2], dtype=jnp.int32)
        return TokenChoice(jnp.where(mask_GS[..., None], experts_E, -1), jnp.sum(self.combine_GSEC, axis=-1))


Decision = TokenChoice | Soft


@pytree_dataclass
class Replay:
    """Decisions to be handed out, or to be taken from an earlier run instead of the routers' own.

    forced: replaces what the router decided, gates included; None leaves it. The router's scores stay its own, and so
    do its losses. record: hand out the decisions that were used, in `LayerStats.decision`.
    """

    forced: TokenChoice | None = None
    record: bool = dataclasses.field(default=False, metadata={"static": True})


@pytree_dataclass
class Scores:
    """What a router thought of every expert, whatever it decided; float32. Balance losses are made of it.

    probability_GSE: sums to 1 over the experts. logsumexp_GS: of the logits. penalty_GS: a loss of the router's own per
    token, its weight included; None is 0. carried_GSE: for the router of the next sparse layer, where it asks for that.
    """

    probability_GSE: Float[Array, "G S E"]
    logsumexp_GS: Float[Array, "G S"]
    penalty_GS: Float[Array, "G S"] | None = None
    carried_GSE: Float[Array, "G S E"] | None = None


@pytree_dataclass
class RouterStats:
    """Sums over the tokens of a statistics unit, so that units, shards, layers and microbatches simply add.

    A unit is what the scope of the balance loss asks for: a sequence, or a routing group. Padding counts in nothing
    but `padding_U`. Counts are int32, exact; layers may be stacked in front of U.

    tokens_U: real tokens. padding_U: the others. declined_U: choices of real tokens that the router left unused.
    load_UE: assignments per expert, before drops. importance_UE: sum of the probabilities.
    z_U: sum of squared logsumexp. entropy_U: sum of the entropies of the probabilities, in nats. penalty_U: sum of the
    router's own penalties.
    """

    tokens_U: Int[Array, "*N U"]
    padding_U: Int[Array, "*N U"]
    declined_U: Int[Array, "*N U"]
    load_UE: Int[Array, "*N U E"]
    importance_UE: Float[Array, "*N U E"]
    z_U: Float[Array, "*N U"]
    entropy_U: Float[Array, "*N U"]
    penalty_U: Float[Array, "*N U"]


@pytree_dataclass
class DispatchStats:
    """What became of the assignments; exact counts, layers may be stacked in front.

    kept, dropped: assignments of real tokens, in total: kept + dropped + declined + k * padding = k * tokens in all.
    served: number of real tokens with 0, 1, ... K experts left.
    gate_histogram: kept assignments by gate, in equal bins of [0, 1].
    routed_by_position, dropped_by_position: assignments by the token's place in its group, in equal bins.
    dropped_E: by expert. Whatever the mesh, a token's own device drops them and the expert's never does.
    gate_mass, kept_gate_mass: sums of the gates before and after drops.
    """

    kept: Int[Array, "*N"]
    dropped: Int[Array, "*N"]
    served: Int[Array, "*N K1"]
    gate_histogram: Int[Array, "*N bins"]
    routed_by_position: Int[Array, "*N bins"]
    dropped_by_position: Int[Array, "*N bins"]
    dropped_E: Int[Array, "*N E"]
    gate_mass: Float[Array, "*N"]
    kept_gate_mass: Float[Array, "*N"]


@pytree_dataclass
class LayerStats:
    """All that a sparse layer reports, layers stacked in front when it comes out of a model.

    decision: what was decided, if it was asked for (`Replay`); it does not add up like the rest.
    carried_BLE: what the router hands on (`Scores.carried_GSE`), from layer to layer only; not in what a model reports.
    """

    router: RouterStats
    dispatch: DispatchStats
    decision: TokenChoice | None = None
    carried_BLE: Float[Array, "B L E"] | None = None
