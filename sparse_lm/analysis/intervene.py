"""What happens to the loss when an expert is taken away, or when all tokens are sent to it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_lm.analysis.observe import check_sparse
from sparse_lm.batch import Batch
from sparse_lm.evals.routing import record
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.types import Replay, TokenChoice
from sparse_lm.objectives.causal import predicted, token_losses

Kind = Literal["remove", "force"]
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Effects:
    """Change of the loss by one expert at a time, in nats per target.

    loss_C: of every domain, without a change; NaN where a domain has no target. targets_C: how many targets it has.
    change_NEC: what the change of one expert adds; change_NE: the same over all targets. error_NEC, error_NE: standard
    errors of these, over rows; NaN where a single row has targets.
    """

    kind: Kind
    loss_C: Float[np.ndarray, "C"]
    targets_C: Int[np.ndarray, "C"]
    change_NEC: Float[np.ndarray, "N E C"]
    error_NEC: Float[np.ndarray, "N E C"]
    change_NE: Float[np.ndarray, "N E"]
    error_NE: Float[np.ndarray, "N E"]

    @property
    def loss(self) -> float:
        """Mean over all targets, without a change."""
        return float(np.nansum(self.loss_C * self.targets_C) / max(1, self.targets_C.sum()))


def ratio(sums_BC: Float[np.ndarray, "B C"], targets_BC: Float[np.ndarray, "B C"]):
    """(mean per target, its standard error over rows), each [C]: of sums that rows bring along with their targets.

    The rows that have targets are the sample: a ratio of two sums over them, by linearisation (Cochran 1977, section
    2.11). NaN without a target, and without a second row for the error.
    """
    total_C, rows_C = targets_BC.sum(0), (targets_BC > 0).sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_C = sums_BC.sum(0) / np.where(total_C > 0, total_C, np.nan)
        squares_C = np.square(sums_BC - targets_BC * mean_C).sum(0)
        error_C = np.sqrt(squares_C * rows_C / np.where(rows_C > 1, rows_C - 1, np.nan)) / total_C
    return mean_C, error_C


def removed(decision: TokenChoice, layer: Int[Array, ""] | int, expert: Int[Array, ""] | int, renormalise: bool):
    """The decisions without this expert in this layer: its assignments become none.

    renormalise: the gates of a token's other experts grow to the sum that all of them had; where none is left, nothing
    is. Otherwise they stay, and the token's output has less in it.
    """
    here_N = (jnp.arange(decision.expert_GSK.shape[0]) == layer)[:, None, None, None]
    gone = here_N & (decision.expert_GSK == expert)
    gate = jnp.where(gone, 0.0, decision.gate_GSK)
    if renormalise:
        before, left = (jnp.sum(g, axis=-1, keepdims=True) for g in (decision.gate_GSK, gate))
        # Exactly 1 where nothing is taken, so that other tokens and layers keep their gates to the last bit.
        gate = gate * jnp.where(left > 0, before / jnp.where(left > 0, left, 1.0), 1.0)
    return dataclasses.replace(decision, expert_GSK=jnp.where(gone, -1, decision.expert_GSK), gate_GSK=gate)


def forced(decision: TokenChoice, layer: Int[Array, ""] | int, expert: Int[Array, ""] | int) -> TokenChoice:
    """The decisions with this expert alone for every token of this layer that had any, at the sum of its gates."""
    here_N = (jnp.arange(decision.expert_GSK.shape[0]) == layer)[:, None, None, None]
    first_K = jnp.arange(decision.expert_GSK.shape[-1]) == 0
    routed = jnp.any(decision.expert_GSK >= 0, axis=-1, keepdims=True)
    alone = jnp.where(first_K & routed, expert, -1).astype(decision.expert_GSK.dtype)
    total = jnp.where(first_K, jnp.sum(decision.gate_GSK, axis=-1, keepdims=True), 0.0)
    return dataclasses.replace(
        decision,
        expert_GSK=jnp.where(here_N, alone, decision.expert_GSK),
        gate_GSK=jnp.where(here_N, total, decision.gate_GSK),
    )


def without_drops(model: Decoder) -> Decoder:
    """The same weights in a model whose experts have room for all tokens in evaluation, so that one can take them.

    For replays: routers that fill the slots of experts would choose otherwise in it.
    """
    moe = check_sparse(model.config)
    # A number also where a router refuses None. The dispatcher is the one that makes no array of tokens x slots.
    room = max(1.0, moe.worth / moe.top_k)
    config = model.config.replace(moe=moe.replace(capacity_factor_eval=room, dispatcher="gather"))
    shaped = jax.eval_shape(lambda key: Decoder(key, config, model.rules), jax.random.key(0))
    return jax.tree.unflatten(jax.tree.structure(shaped), jax.tree.leaves(model))


def effects(
    model: Decoder,
    batches: Sequence[Batch],
    num_domains: int,
    kind: Kind,
    renormalise: bool = False,
    progress: Progress = lambda line: None,
) -> Effects:
    """Removes every expert of every sparse layer in turn, or forces all tokens on it.

    All other decisions, those of later layers among them, are the recorded ones: the effect is that of what the expert
    computes, and not of what later routers would make of it. Forced tokens are not dropped, and neither is anything
    else then, in the loss without a change too.
    """
    moe = check_sparse(model.config)
    shape = (sum(model.config.sparse), moe.num_choices, num_domains)
    on_device = [jax.tree.map(jnp.asarray, batch) for batch in batches]
    decisions = [record(model, batch) for batch in on_device]
    model = without_drops(model) if kind == "force" else model
    step = _jitted(kind, renormalise, num_domains)

    def nats(layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        pairs = zip(on_device, decisions, strict=True)
        found = [jax.device_get(step(model, batch, decision, layer, expert)) for batch, decision in pairs]
        sums, targets = (np.concatenate([each[i] for each in found]).astype(np.float64) for i in (0, 1))
        return sums, targets

    before_BC, targets_BC = nats(-1, 0)  # no layer has this number, so that nothing changes
    by_domain, overall, begun = np.zeros((2, *shape)), np.zeros((2, *shape[:2])), time.monotonic()
    for layer in range(shape[0]):
        for expert in range(shape[1]):
            added_BC = nats(layer, expert)[0] - before_BC
            by_domain[:, layer, expert] = ratio(added_BC, targets_BC)
            alone = ratio(added_BC.sum(1, keepdims=True), targets_BC.sum(1, keepdims=True))
            overall[:, layer, expert] = np.concatenate(alone)
        left = (time.monotonic() - begun) * (shape[0] / (layer + 1) - 1)
        progress(f"{kind} experts: {layer + 1} of {shape[0]} layers, about {left:.0f} s left")
    targets_C = targets_BC.sum(0).astype(np.int64)
    return Effects(kind, ratio(before_BC, targets_BC)[0], targets_C, *by_domain, *overall)


def _jitted(kind: Kind, renormalise: bool, num_domains: int):
    @jax.jit
    def step(model: Decoder, batch: Batch, decision: TokenChoice, layer, expert) -> tuple[jax.Array, jax.Array]:
        changed = forced(decision, layer, expert) if kind == "force" else removed(decision, layer, expert, renormalise)
        inputs = (batch.tokens_BL[:, :-1], batch.segments_BL[:, :-1], batch.positions_BL[:, :-1])
        logits_BLV = model(*inputs, None, Replay(changed))[0]
        weight_BL = predicted(batch).astype(jnp.float32)
        nats_BL = token_losses(logits_BLV, batch.tokens_BL[:, 1:]) * weight_BL
        of_BLC = jax.nn.one_hot(batch.domains_BL[:, 1:], num_domains)
        return jnp.einsum("BL,BLC->BC", nats_BL, of_BLC), jnp.einsum("BL,BLC->BC", weight_BL, of_BLC)

    return step
