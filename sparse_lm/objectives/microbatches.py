"""How a batch is cut into microbatches."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sparse_lm.batch import Batch
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.layer import rows_together
from sparse_lm.sharding import Rules


def microbatches(batch: Batch, number: int, rules: Rules, together: int = 1) -> Batch:
    """[B, L] -> [number, B / number, L]: microbatch m has the rows m, m + number, ...; no row changes its device.

    together: neighbouring rows that stay in one microbatch, because they are one routing group; m then counts groups.
    Raises `ValueError` when the rows cannot be cut so.
    """

    def cut(x):
        rows, length = x.shape
        if rows % (number * together):
            raise ValueError(
                f"train.accumulate={number} does not divide {rows} rows in routing groups of {together}; choose a "
                f"batch of a multiple of {number * together} rows, or a smaller model.moe.group_size"
            )
        x = jnp.swapaxes(rules.reshape(x, (rows // (number * together), number, together, length), "B..."), 0, 1)
        return rules.reshape(x, (number, rows // number, length), ".B.")

    return jax.tree.map(cut, batch)


def microbatches_of(model: Decoder, batch: Batch, number: int) -> Batch:
    """`microbatches` that leave the routing groups of the model whole."""
    moe = model.config.moe
    together = rows_together(moe, batch.tokens_BL.shape[1] - 1) if moe else 1
    return microbatches(batch, number, model.rules, together)
