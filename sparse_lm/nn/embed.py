"""Token embedding and the map back to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparse_lm.nn.init import fan_in_normal
from sparse_lm.sharding import Rules


class Embedding(nnx.Module):
    """A table of token vectors with standard deviation 1 / sqrt(D), scaled by sqrt(D) on the way in.

    Used in both directions when embeddings are tied: the logits then see the unscaled table (Press & Wolf 2017).
    """

    def __init__(self, key: jax.Array, vocab_size: int, d_model: int, rules: Rules):
        self.rules = rules
        self.table_VD = nnx.Param(fan_in_normal(key, (vocab_size, d_model), d_model))

    def encode(self, tokens_BL: Int[Array, "B L"], dtype) -> Float[Array, "B L D"]:
        """Token vectors in `dtype`."""
        table_VD = self.rules.whole(self.table_VD[...], dtype)
        x_BLD = self.rules.take_rows(table_VD, tokens_BL, "BLD")
        return x_BLD * jnp.asarray(table_VD.shape[-1] ** 0.5, dtype)

    def decode(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L V"]:
        """Logits, summed and kept in float32, cut along V under tensor parallelism."""
        return self.rules.einsum("BLD,VD->BLV", x_BLD, self.matrix(x_BLD.dtype), dtype=jnp.float32)

    def matrix(self, dtype) -> Float[Array, "V D"]:
        """The table as `decode` multiplies with it: in `dtype`, whole along D and cut along V."""
        return self.rules.gather(self.table_VD[...], "VD", dtype)
