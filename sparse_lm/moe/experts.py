"""Stacked experts: one matrix product for all of them."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from sparse_lm.nn.init import fan_in_normal
from sparse_lm.nn.mlp import GATED, activate
from sparse_lm.nn.remat import named
from sparse_lm.products import einsum

Product = Callable[[jax.Array, jax.Array], jax.Array]
Spread = Callable[[jax.Array], jax.Array]


class Experts(nnx.Module):
    """E feed-forward layers D -> F -> D, each on its own rows. Knows neither mesh nor router.

    dropout_rate: of the hidden values (expert dropout: Fedus et al. 2021, section 2.4). bias: whether each product has
    a bias, which starts at 0 (gpt-oss).
    """

    def __init__(
        self,
        key: jax.Array,
        sizes: tuple[int, int, int],
        kind: str,
        init_scale: float = 1.0,
        dropout_rate: float = 0.0,
        bias: bool = False,
    ):
        """sizes: (experts, model width, hidden width). kind: the activation, see `sparse_lm.nn.mlp`."""
        num_experts, d_model, d_hidden = sizes
        up, gate, down = jax.random.split(key, 3)
        self.kind, self.num_experts, self.d_hidden, self.dropout_rate = kind, num_experts, d_hidden, dropout_rate
        self.up_EDF = nnx.Param(fan_in_normal(up, (num_experts, d_model, d_hidden), d_model, init_scale))
        gated = kind in GATED
        self.gate_EDF = nnx.Param(fan_in_normal(gate, self.up_EDF.shape, d_model, init_scale)) if gated else None
        self.down_EFD = nnx.Param(fan_in_normal(down, (num_experts, d_hidden, d_model), d_hidden, init_scale))

        def zeros(width):
            return nnx.Param(jnp.zeros((num_experts, width), jnp.float32))

        self.up_bias_EF = zeros(d_hidden) if bias else None
        self.gate_bias_EF = zeros(d_hidden) if bias and gated else None
        self.down_bias_ED = zeros(d_model) if bias else None

    def __call__(
        self,
        x_ERD: Float[Array, "E R D"],
        ids_ER: Int[Array, "E R"] | None = None,
        key: jax.Array | None = None,
    ) -> Float[Array, "E R D"]:
        """Expert e applied to each of its R rows; the weights in memory may be a shard along E and F.

        With a shard of F the result is a partial sum. key and ids_ER: for dropout, a number per (token, expert) that
        seeds the mask of its row, so that the mask does not depend on where the row is computed.
        """
        return self.on_rows(
            x_ERD,
            lambda x_ERA, w_EAB: einsum("ERA,EAB->ERB", x_ERA, w_EAB),
            lambda bias_EA: bias_EA[:, None],
            ids_ER,
            key,
        )

    def on_rows(
        self, x: jax.Array, product: Product, spread: Spread, ids: jax.Array | None, key: jax.Array | None
    ) -> jax.Array:
        """The same for rows in any order [..., D]: `product` and `spread` say which expert each row belongs to.

        product: (rows [..., A], w_EAB) -> [..., B]. spread: a bias per expert -> one that adds to the rows. ids: a
        number per row.
        """
        x = named(x, "dispatch")
        up = _plus(product(x, self.up_EDF[...]), self.up_bias_EF, spread)
        gate = None
        if self.gate_EDF is not None:
            gate = _plus(product(x, self.gate_EDF[...]), self.gate_bias_EF, spread)
        up, gate = named((up, gate), "expert_hidden")
        hidden = activate(self.kind, up, gate)
        if key is not None and ids is not None and self.dropout_rate > 0:
            hidden = _row_dropout(hidden, self.dropout_rate, key, ids, self.d_hidden)
        y = named(product(hidden, self.down_EFD[...]), "expert_out")
        if self.down_bias_ED is None:
            return y
        bias = spread(self.down_bias_ED[...])
        if hidden.shape[-1] < self.d_hidden:  # partial sums of shards: one of them adds the bias
            bias = jnp.where(jax.lax.axis_index("model") == 0, bias, jnp.zeros((), bias.dtype))
        return y + bias


def _plus(x: jax.Array, bias_EF: nnx.Param | None, spread: Spread) -> jax.Array:
    return x if bias_EF is None else x + spread(bias_EF[...])


def _row_dropout(hidden_ERF, rate, key, ids_ER, d_hidden):
    def row(row_id):
        return jax.random.bernoulli(jax.random.fold_in(key, row_id), 1 - rate, (d_hidden,))

    for _ in range(ids_ER.ndim):
        row = jax.vmap(row)
    keep_ERF = row(ids_ER)
    if hidden_ERF.shape[-1] < d_hidden:  # a shard of the hidden width: its own columns of the whole mask
        start = jax.lax.axis_index("model") * hidden_ERF.shape[-1]
        keep_ERF = jax.lax.dynamic_slice_in_dim(keep_ERF, start, hidden_ERF.shape[-1], axis=-1)
    return jnp.where(keep_ERF, hidden_ERF / (1 - rate), jnp.zeros((), hidden_ERF.dtype))
