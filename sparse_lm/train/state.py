"""What a training step reads and returns: all of it is checkpointed, none of it lives anywhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Scalar

from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.types import pytree_dataclass
from sparse_lm.sharding import Rules


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
    return TrainState(zero, model, rules.shard_parameters(state), zero, zero)
