"""Routing decisions of a model: recorded, stored, replayed in another model, compared and counted.

decisions = record(model, batch)                     # of every sparse layer
save("decisions.npz", decisions)
loss(other, batch, load("decisions.npz"))            # the other model, forced to route alike
saturation(record(early, batch), record(late, batch))
"""

from __future__ import annotations

import pathlib
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparse_lm.batch import Batch
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.types import Replay, TokenChoice
from sparse_lm.objectives.causal import predicted, token_losses


def record(model: Decoder, batch: Batch, key: jax.Array | None = None) -> TokenChoice:
    """The decisions on this batch, stacked over the sparse layers: expert_GSK is [N, G, S, K] and so on.

    key: None routes as in evaluation. Raises `ValueError` when the model has no sparse layer.
    """
    if not any(model.config.sparse):
        raise ValueError("the model is dense: it has no decisions to record; set model.moe")
    decision = _record(model, batch, key)[0]
    assert decision is not None
    return decision


def record_attention(model: Decoder, batch: Batch, key: jax.Array | None = None) -> TokenChoice:
    """The same of the attention's experts, in all layers: expert_GSK is [N, B, L, K], every row being a group.

    Raises `ValueError` when the attention has no experts.
    """
    if model.config.attention is None:
        raise ValueError("the attention has no experts: it has no decisions to record; set model.attention")
    decision = _record(model, batch, key)[1]
    assert decision is not None
    return decision


def loss(model: Decoder, batch: Batch, forced: TokenChoice | None = None, key: jax.Array | None = None) -> float:
    """Mean nats per target of the model on this batch, with the decisions that are given in place of its own.

    Exactly the loss of the model and key that were recorded, on the same devices. Raises `ValueError` when the
    decisions are of another number of layers, groups or tokens.
    """
    return float(_loss(model, batch, forced, key))


@jax.jit
def _record(model: Decoder, batch: Batch, key: jax.Array | None) -> tuple[TokenChoice | None, TokenChoice | None]:
    reports = model(*_inputs(batch), key, Replay(record=True))[1]
    parts = (reports.feed_forward, reports.attention)
    feed_forward, attention = (None if part is None else part.decision for part in parts)
    return feed_forward, attention


@jax.jit
def _loss(model: Decoder, batch: Batch, forced: TokenChoice | None, key: jax.Array | None) -> jax.Array:
    replay = (
        None
        if forced is None
        else Replay(jax.tree.map(lambda leaf: model.rules.constrain(leaf, "NGSK"[: leaf.ndim]), forced))
    )
    logits_BLV = model(*_inputs(batch), key, replay)[0]
    weight_BL = predicted(batch).astype(jnp.float32)
    return jnp.sum(token_losses(logits_BLV, batch.tokens_BL[:, 1:]) * weight_BL) / jnp.maximum(jnp.sum(weight_BL), 1)


def _inputs(batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    return batch.tokens_BL[:, :-1], batch.segments_BL[:, :-1], batch.positions_BL[:, :-1]


def save(path: str | pathlib.Path, decisions: TokenChoice) -> None:
    """Writes the decisions as a compressed npz file."""
    arrays = {"expert": decisions.expert_GSK, "gate": decisions.gate_GSK, "gate_on": decisions.gate_on}
    if decisions.order_GS is not None:
        arrays["order"] = decisions.order_GS
    np.savez_compressed(path, allow_pickle=False, **{name: np.asarray(value) for name, value in arrays.items()})


def load(path: str | pathlib.Path) -> TokenChoice:
    """Reads what `save` wrote. Raises `ValueError` when the file holds something else."""
    with np.load(path, allow_pickle=False) as stored:
        names = set(stored.files)
        if not {"expert", "gate", "gate_on"} <= names:
            raise ValueError(
                f"{path}: holds {sorted(names)} and no decisions; write it with sparse_lm.evals.routing.save"
            )
        order = jnp.asarray(stored["order"]) if "order" in names else None
        gate_on = cast(Literal["output", "input"], str(stored["gate_on"]))
        return TokenChoice(jnp.asarray(stored["expert"]), jnp.asarray(stored["gate"]), order, gate_on)


def saturation(earlier: TokenChoice, later: TokenChoice) -> Float[np.ndarray, "N"]:
    """Router saturation per layer: the mean over tokens of |E_earlier and E_later| / |E_later|, E the chosen experts.

    1 when a token's experts are those that it will have, k / E for routers that have nothing in common. Tokens without
    an expert in the later decisions count nowhere. Source: Muennighoff et al. 2024 (OLMoE, 2409.02060), section 5.1.
    """
    before, after = (np.asarray(decision.expert_GSK) for decision in (earlier, later))
    if before.shape[:3] != after.shape[:3]:
        raise ValueError(
            f"decisions of {before.shape[:3]} and {after.shape[:3]} layers, groups, tokens: not comparable"
        )
    same = ((after[..., :, None] == before[..., None, :]) & (after[..., :, None] >= 0)).any(-1).sum(-1)
    chosen = (after >= 0).sum(-1)
    share = np.where(chosen > 0, same / np.maximum(chosen, 1), 0.0)
    return share.sum((1, 2)) / np.maximum((chosen > 0).sum((1, 2)), 1)


def coactivation(decisions: TokenChoice, num_experts: int) -> Float[np.ndarray, "N E E"]:
    """[i, j]: of the tokens that chose expert i, the share that chose j too; 1 on the diagonal, 0 for unused experts.

    Source: Muennighoff et al. 2024 (OLMoE), section 5.2: N_ij / N_i.
    """
    both = pair_counts(decisions.expert_GSK, num_experts).astype(np.float64)
    own = np.einsum("nii->ni", both)
    return both / np.maximum(own, 1)[:, :, None]


def pair_counts(expert_GSK: Int[Array, "N G S K"], num_experts: int) -> Int[np.ndarray, "N E E"]:
    """How many tokens chose both experts, per layer; on the diagonal how many chose the one."""
    expert = np.asarray(expert_GSK).reshape(expert_GSK.shape[0], -1, expert_GSK.shape[-1])
    counts = np.zeros((len(expert), num_experts, num_experts), np.int64)
    for layer, chosen_TK in enumerate(expert):
        used_TE = np.zeros((len(chosen_TK), num_experts + 1), np.int64)
        np.put_along_axis(used_TE, np.where(chosen_TK < 0, num_experts, chosen_TK), 1, axis=1)
        counts[layer] = used_TE[:, :num_experts].T @ used_TE[:, :num_experts]
    return counts
