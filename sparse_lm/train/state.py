"""What a training step reads and returns: all of it is checkpointed, none of it lives anywhere else."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Scalar

from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.types import pytree_dataclass
from sparse_lm.sharding import Rules, abstract_sharded


@pytree_dataclass
class TrainState:
    """step: optimizer steps taken, skipped ones included. nonfinite: steps skipped so far, and in a row until now."""

    step: Scalar
    model: Decoder
    optimizer: optax.OptState
    nonfinite: Scalar
    nonfinite_in_a_row: Scalar


def create_state(
    key: jax.Array, config: ModelConfig, optimizer: optax.GradientTransformation, rules: Rules
) -> TrainState:
    """A fresh state, every array laid out by the rules. To be compiled: `jax.jit(create_state, static_argnums=...)`."""
    model = rules.shard_parameters(Decoder(key, config, rules))
    zero = jnp.zeros((), jnp.int32)
    state = optimizer.init(nnx.split(model, nnx.Param, ...)[1])
    return TrainState(zero, model, rules.for_state.shard_parameters(state), zero, zero)


def state_shapes(
    key: jax.Array | jax.ShapeDtypeStruct,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    rules: Rules,
    mesh: Mesh | AbstractMesh,
) -> TrainState:
    """Shapes, dtypes and shardings of what `create_state` makes, under `mesh`, which is set."""
    shapes = jax.eval_shape(lambda key: create_state(key, config, optimizer, rules), key)
    state = abstract_sharded(shapes, rules, cast(Mesh, mesh))
    return dataclasses.replace(state, optimizer=abstract_sharded(shapes.optimizer, rules.for_state, cast(Mesh, mesh)))
