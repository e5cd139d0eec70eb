"""The sparse layer: router, dispatcher, experts and shared experts, composed."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from sparse_lm.mesh import platform
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.free import FreeExperts, combine
from sparse_lm.moe.grouped import kernel_of
from sparse_lm.moe.shared import SharedExperts
from sparse_lm.moe.slots import SlotRule, capacity
from sparse_lm.moe.stats import dispatch_stats, router_stats
from sparse_lm.moe.types import Decision, LayerStats, Replay, RouterInputs, Soft, TokenChoice
from sparse_lm.nn.dropout import split_keys
from sparse_lm.nn.remat import named
from sparse_lm.sharding import Rules


class MoE(nnx.Module):
    """A drop-in for `sparse_lm.nn.mlp.Mlp`: D -> D, with statistics beside."""

    def __init__(self, key: jax.Array, d_model: int, d_expert: int, kind: str, config: MoEConfig, rules: Rules):
        router, experts, shared = jax.random.split(key, 3)
        self.config, self.rules = config, rules
        kernel_of(config.grouped, platform())  # what cannot run is refused here, before anything is computed
        self.router = config.router.build(router, config.router_shape(d_model), rules)
        sizes = (config.num_experts, d_model, d_expert)
        self.experts = Experts(experts, sizes, kind, config.init_scale, config.expert_dropout, config.expert_bias)
        free = (config.num_zero, config.num_copy, config.num_constant)
        self.free = (
            FreeExperts(jax.random.fold_in(key, 3), d_model, config.num_experts, free, rules)
            if config.num_free
            else None
        )
        beside = (d_model, config.shared_width(d_expert))
        self.shared = (
            SharedExperts(shared, beside, kind, rules, config.shared_gate, config.expert_dropout)
            if config.num_shared
            else None
        )

    def __call__(
        self,
        x_BLD: Float[Array, "B L D"],
        mask_BL: Bool[Array, "B L"],
        key: jax.Array | None = None,
        ids_BL: Int[Array, "B L"] | None = None,
        previous_BL: Int[Array, "B L"] | None = None,
        replay: Replay | None = None,
        carried_BLE: Float[Array, "B L E"] | None = None,
    ) -> tuple[Float[Array, "B L D"], LayerStats]:
        """The experts' output and the statistics of the routing.

        mask_BL: False is padding, which reaches no routed expert. ids_BL: token ids, for routers that look at them;
        None is 0 everywhere. previous_BL: the id before in the same document, -1 where there is none; None is -1
        everywhere. carried_BLE: see `RouterInputs`. key: None is evaluation: no noise, no dropout, the capacity of
        evaluation. Raises `ValueError` when the tokens cannot be cut into groups.
        """
        config, rules = self.config, self.rules
        batch, length = mask_BL.shape
        size = group_size(config, batch, length)
        x_GSD, mask_GS = self._grouped(x_BLD, size), self._grouped(mask_BL, size)
        router_key, expert_key, shared_key, order_key = split_keys(key, 4)

        ids_GS = self._grouped(jnp.zeros_like(mask_BL, jnp.int32) if ids_BL is None else ids_BL, size)
        dispatcher = self.dispatcher(size, training=key is not None)
        previous_GS = None if previous_BL is None else self._grouped(previous_BL, size)
        carried_GSE = None if carried_BLE is None else self._grouped(carried_BLE, size)
        inputs = RouterInputs(x_GSD, mask_GS, ids_GS, dispatcher.slots.capacity, previous_GS, carried_GSE)
        decision, scores = named(self.router(inputs, router_key), "router")
        if config.priority == "random" and order_key is not None:
            order_GS = rules.draw(jax.random.uniform, order_key, mask_GS.shape, "GS")
            decision = dataclasses.replace(decision, order_GS=order_GS)
        if replay is not None and replay.forced is not None:
            decision = _forced(replay.forced, decision)
        counted = decision.choices(mask_GS) if isinstance(decision, Soft) else decision
        sent = decision if self.free is None else self.free.others(counted)
        y_GSD, kept_GSK = dispatcher(self.experts, x_GSD, sent, expert_key)
        if self.free is not None:
            y_GSD, kept_GSK = combine(self.free, x_GSD, counted, y_GSD, kept_GSK, self._after_drop)
        y_BLD = named(self._ungrouped(y_GSD, x_BLD.shape), "combine")
        if self.shared is not None:
            y_BLD = self.shared(x_BLD, y_BLD, shared_key)
        unit = length if config.balance.scope == "sequence" else size
        stats = LayerStats(
            router_stats(counted, scores, mask_GS, unit, rules),
            dispatch_stats(counted, kept_GSK, mask_GS, config.num_choices),
            counted if replay is not None and replay.record else None,
            None
            if scores.carried_GSE is None
            else self._ungrouped(scores.carried_GSE, (batch, length, config.num_choices)),
        )
        return y_BLD, stats

    def _grouped(self, x: jax.Array, size: int) -> jax.Array:
        """[B, L, ...] -> [G, S, ...]."""
        batch, length, *rest = x.shape
        if self.config.grouping == "position":
            x = self.rules.reshape(x, (batch // size, size, length, *rest), "G.." + "." * len(rest))
            x = jnp.swapaxes(x, 1, 2)
        return self.rules.reshape(x, (batch * length // size, size, *rest), "GSD"[: 2 + len(rest)])

    def _ungrouped(self, y_GSD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """[G, S, D] -> [B, L, D]: the way back."""
        if self.config.grouping == "position":
            (batch, length, width), size = shape, y_GSD.shape[1]
            y_GLSD = self.rules.reshape(y_GSD, (batch // size, length, size, width), "G...")
            y_GSD = jnp.swapaxes(y_GLSD, 1, 2)
        return self.rules.reshape(y_GSD, shape, "BLD")

    @property
    def _after_drop(self) -> bool:
        return getattr(self.config.router, "renormalise", "none") == "after_drop"

    def dispatcher(self, size: int, training: bool):
        """The dispatcher for groups of `size` tokens."""
        config = self.config
        factor = config.capacity_factor if training else config.capacity_factor_eval
        slots = SlotRule(
            capacity(factor, config.top_k, size, config.worth),
            config.priority,
            # With free experts the dispatcher does not see all that is kept.
            renormalise=self._after_drop and self.free is None,
        )
        how = config.grouped, config.exchange_chunks, config.hot_copies, config.exchange_room
        return DISPATCHERS[config.dispatcher](slots, self.rules, *how)


def _forced(forced: TokenChoice, own: Decision) -> TokenChoice:
    """The forced decision. Raises `ValueError` when it was made for other groups, and where nothing is decided."""
    if isinstance(own, Soft):
        raise ValueError("router.kind=soft mixes all tokens and decides nothing that could be replayed")
    got, here = forced.expert_GSK.shape[:2], own.expert_GSK.shape[:2]
    if got != here:
        raise ValueError(
            f"the forced decisions are of {got[0]} groups of {got[1]} tokens, the layer routes {here[0]} of {here[1]}; "
            "replay the batch that was recorded, with the same group_size and grouping"
        )
    return forced


def rows_together(config: MoEConfig, length: int) -> int:
    """Neighbouring rows of a batch that share a group, and so have to stay together."""
    size = config.group_size or 1
    return size if config.grouping == "position" else max(1, size // length)


def group_size(config: MoEConfig, batch: int, length: int) -> int:
    """Tokens per group for a batch of this shape; a configured size above one sequence spans neighbouring ones.

    Raises `ValueError` when the batch cannot be cut so.
    """
    size = config.group_size or length
    if config.grouping == "position":
        if batch % size:
            raise ValueError(
                f"model.moe.group_size={size} does not divide the {batch} rows of the batch, "
                f"as grouping=position asks; choose a batch of a multiple of {size} rows"
            )
        return size
    if (length % size and size % length) or batch * length % size:
        raise ValueError(
            f"model.moe.group_size={size} neither divides the length {length} nor is a multiple of it that divides "
            f"the {batch * length} tokens of the batch"
        )
    return size
