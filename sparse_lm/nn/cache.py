"""What the tokens so far have left for the attention of later ones: rows of fixed length T, written place by place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparse_lm.sharding import Rules


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of each key/value head; what is not yet written is masked out."""

    key_BTJI: Float[Array, "*N B T J I"]
    value_BTJI: Float[Array, "*N B T J I"]

    def write(self, key_BLJI: jax.Array, value_BLJI: jax.Array, start: jax.Array) -> KeyValues:
        """A copy with the new keys and values at `start` and after."""
        return KeyValues(_write(self.key_BTJI, key_BLJI, start), _write(self.value_BTJI, value_BLJI, start))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentKeys:
    """What keys and values of all heads are made from, and the rotated key that they share."""

    latent_BTP: Float[Array, "*N B T P"]
    rope_key_BTA: Float[Array, "*N B T A"]

    def write(self, latent_BLP: jax.Array, rope_key_BLA: jax.Array, start: jax.Array) -> LatentKeys:
        """A copy with the new ones at `start` and after."""
        return LatentKeys(_write(self.latent_BTP, latent_BLP, start), _write(self.rope_key_BTA, rope_key_BLA, start))


AttentionCache = KeyValues | LatentKeys


def empty_key_values(rows: tuple[int, int, int], heads: tuple[int, int], dtype, rules: Rules) -> KeyValues:
    """Room for keys and values. rows: layers, sequences, places. heads: key/value heads and their width."""
    zeros = jnp.zeros((*rows, *heads), dtype)
    return KeyValues(rules.constrain(zeros, "NBTJI"), rules.constrain(zeros, "NBTJI"))


def empty_latents(rows: tuple[int, int, int], widths: tuple[int, int], dtype, rules: Rules) -> LatentKeys:
    """Room for latents. rows: layers, sequences, places. widths: of latents and of the rotated key."""
    latent, rope_key = (jnp.zeros((*rows, width), dtype) for width in widths)
    return LatentKeys(rules.constrain(latent, "NBTP"), rules.constrain(rope_key, "NBTA"))


def _write(stored_BT: jax.Array, new_BL: jax.Array, start: jax.Array) -> jax.Array:
    """[B, T, ...] with [B, L, ...] at `start` and after, in the dtype of the former."""
    return jax.lax.dynamic_update_slice_in_dim(stored_BT, new_BL.astype(stored_BT.dtype), start, axis=1)
