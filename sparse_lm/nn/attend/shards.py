"""Attention on every device's own rows, heads and queries."""

from __future__ import annotations

from collections.abc import Callable

import jax

from sparse_lm.mesh import explicit_mesh, on_shards, varying
from sparse_lm.nn.attend.context import WHOLE, balanced, exchange, of_pieces
from sparse_lm.nn.attend.sight import Sight
from sparse_lm.sharding import Rules


def per_shard(body: Callable, operands: tuple, sight: Sight, rules: Rules, checked: bool) -> jax.Array:
    """`body(operands, sight, pieces)` on every device's own rows, heads and queries, none of which sees another's.

    operands: queries [B, L, H, I], keys [B, T, J, I], values [B, T, J, W], sinks [H] or None. A single key/value head
    beside several query heads is whole everywhere. pieces: see `context`. checked: False for kernels, whose results
    say nothing of the axes over which they differ. Without a mesh it is a plain call.
    """
    if not explicit_mesh():
        return body(operands, sight, WHOLE)
    heads = "." if operands[1].shape[2] == 1 and operands[0].shape[2] > 1 else "J"
    letters = ("BLHI", f"BT{heads}I", f"BT{heads}I", "H")
    specs = tuple(None if x is None else rules.act(names, x.shape) for x, names in zip(operands, letters, strict=True))
    length = operands[0].shape[1]
    devices = rules.ways("L", length) or 1
    pieces = balanced(devices, length) if sight.layout != "cache" else tuple((d,) for d in range(devices))

    def local(operands, sight):
        if checked:  # what enters a custom gradient has to vary over every axis over which its cotangents do
            operands, sight = jax.tree.map(varying, operands), jax.tree.map(varying, sight)
        if devices == 1:
            return body(operands, sight, WHOLE)
        query, *others = operands
        mixed = body((exchange(query, pieces), *others), of_pieces(sight, pieces), pieces)
        return exchange(mixed, pieces, back=True)

    sight = jax.tree.map(lambda x: rules.constrain(x, "B."), sight)  # places are made without a layout
    in_specs = (specs, jax.tree.map(lambda _: rules.act("B."), sight))
    return on_shards(local, in_specs, specs[0], checked)(operands, sight)
