"""Loss and gradients of a whole batch from microbatches, exactly: a step does not depend on how it is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.batch import Batch
from sparse_lm.mesh import manual_axis_size
from sparse_lm.models.decoder import Decoder
from sparse_lm.models.depth import routed_tokens
from sparse_lm.objectives.causal import LossParts, Totals, causal_loss, count
from sparse_lm.objectives.microbatches import microbatches_of
from sparse_lm.sharding import Rules


def loss_and_gradients(
    model: Decoder, batch: Batch, key: jax.Array, number: int, num_domains: int, in_flight: int | None = None
) -> tuple[jax.Array, LossParts, Any]:
    """The loss of the batch, its parts, and the gradients (a `State` of the parameters), from `number` microbatches.

    Sums are divided by the batch's totals, which are counted first, so that the shares of the microbatches add up to
    the loss of the batch whatever their sizes. With the global scope the load-balance loss multiplies the loads of the
    whole batch with probabilities; loads need a forward pass, so with more than one microbatch there is one more of
    them, without gradients. (A running count would be cheaper and would make the loss depend on the cut.)

    in_flight: how many of them pass the stages of a pipeline together, where the mesh has stages; None is all.
    """
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    moe, depth, attention = model.config.moe, model.config.depth, model.config.attention
    balance, attention_balance = (part.losses if part else None for part in (moe, attention))
    totals = count(batch)
    if depth is not None:
        totals = dataclasses.replace(totals, routed_N=routed_tokens(model.config, batch.segments_BL[:, :-1] > 0))

    def loss(parameters, batch, key, totals):
        apply, weight = nnx.merge(graph, parameters, rest), depth.weight if depth else 0.0
        return causal_loss(apply, batch, key, totals, balance, num_domains, weight, attention_balance)

    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    if number == 1:
        (total, parts), gradients = value_and_grad(parameters, batch, key, totals)
        return total, parts, gradients
    inputs = (microbatches_of(model, batch, number), jax.random.split(key, number))
    if manual_axis_size("stage") > 1:
        inputs = _flights(inputs, in_flight or number, model.rules)
    if any(b is not None and b.scope == "global" and b.load > 0 for b in (balance, attention_balance)):
        load_NE, attention_NE = _loads(loss, parameters, inputs, totals)
        totals = dataclasses.replace(totals, load_NE=load_NE, attention_NE=attention_NE)
    return _summed(lambda batch, key: value_and_grad(parameters, batch, key, totals), inputs)


def _loads(loss: Callable, parameters: Any, inputs: Any, totals: Totals) -> tuple[jax.Array | None, jax.Array | None]:
    """Assignments per layer and expert of the whole batch, of feed-forward and of attention experts; None without any.

    What this pass computes beyond routing is not used.
    """

    def body(_, inputs):
        parts = loss(parameters, *inputs, totals)[1]
        groups = (parts.stats, parts.attention.stats if parts.attention else None)
        return None, tuple(None if stats is None else jnp.sum(stats.router.load_UE, axis=1) for stats in groups)

    return jax.tree.map(lambda load: jnp.sum(load, axis=0), jax.lax.scan(body, None, inputs)[1])


def _flights(inputs: tuple[Batch, jax.Array], size: int, rules: Rules) -> tuple[Batch, jax.Array]:
    """[microbatches, ...] -> [flights, microbatches of a flight, ...]."""
    batch, keys = inputs
    batch = jax.tree.map(lambda x: rules.reshape(x, (len(x) // size, size, *x.shape[1:]), "..B."), batch)
    return batch, keys.reshape(-1, size)


def _summed(function: Callable, inputs: Any) -> tuple[jax.Array, LossParts, Any]:
    """The sum of ((total, parts), gradients) over the leading axis of the inputs, one microbatch at a time."""
    first = jax.tree.map(lambda x: x[0], inputs)
    shapes = jax.eval_shape(function, *first)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, out_sharding=s.sharding), shapes)

    def body(carry, inputs):
        return jax.tree.map(jnp.add, carry, function(*inputs)), None

    ((total, parts), gradients), _ = jax.lax.scan(body, zeros, inputs)
    return total, parts, gradients
