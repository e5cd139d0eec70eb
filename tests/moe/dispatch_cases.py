"""A dispatcher alone with all its gradients, on loads of every kind."""

from __future__ import annotations

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sparse_lm.moe.experts import Experts
from sparse_lm.moe.types import TokenChoice
from sparse_lm.sharding import DEFAULT

G, S, E, D, K = 8, 6, 4, 5, 2
RNG = np.random.default_rng(0)
LOADS = {
    "mixed": np.stack([RNG.permutation(E)[:K] for _ in range(G * S)]).reshape(G, S, K),
    "one_device": np.broadcast_to([2, 3], (G, S, K)),
    "one_expert": np.broadcast_to([1, -1], (G, S, K)),
    "nobody": np.full((G, S, K), -1),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
@functools.partial(jax.value_and_grad, argnums=(2, 3, 4), has_aux=True)
def _total(dispatcher, gate_on, experts, x_GSD, gate_GSK, expert_GSK, key):
    gate_GSK = jnp.where(expert_GSK >= 0, gate_GSK, 0.0)
    y_GSD, kept_GSK = dispatcher(experts, x_GSD, TokenChoice(expert_GSK, gate_GSK, gate_on=gate_on), key)
    return jnp.sum(jnp.sin(y_GSD)), (y_GSD, kept_GSK)


def with_gradients(dispatcher, mesh, expert_GSK, gate_on="output", sizes=(E, D, 7), dropout=0.0):
    """Output, what was kept, and the gradients of experts, tokens and gates; compiled once for all loads.

    mesh: None is one device without a mesh. sizes: of the experts. dropout: of their hidden values.
    """
    with on_mesh(mesh):
        experts = DEFAULT.shard_parameters(Experts(jax.random.key(1), sizes, "swiglu", dropout_rate=dropout, bias=True))
        x_GSD = DEFAULT.constrain(jax.random.normal(jax.random.key(0), (G, S, D)), "GSD")
        expert_GSK = DEFAULT.constrain(jnp.asarray(expert_GSK, jnp.int32), "GSK")
        gate_GSK = DEFAULT.constrain(jax.random.uniform(jax.random.key(2), (G, S, K)), "GSK")
        (_, (y_GSD, kept_GSK)), gradients = _total(
            dispatcher, gate_on, experts, x_GSD, gate_GSK, expert_GSK, jax.random.key(3)
        )
        return jax.tree.map(np.asarray, (y_GSD, kept_GSK, gradients))


def on_mesh(mesh):
    """A context in which the mesh is set, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def assert_close(got, expected):
    """Every leaf of the two trees alike, up to sums in another order."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
