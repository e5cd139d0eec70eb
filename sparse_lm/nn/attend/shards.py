"""Attention on every device's own rows and heads, and what kind of device that is."""

from __future__ import annotations

from collections.abc import Callable

import jax

from sparse_lm.nn.attend.sight import Sight
from sparse_lm.sharding import Rules, explicit_mesh, varying


def per_shard(body: Callable, operands: tuple, sight: Sight, rules: Rules, checked: bool) -> jax.Array:
    """`body(operands, sight)` on every device's own rows and heads, none of which sees another's.

    operands: queries [B, L, H, I], keys [B, T, J, I], values [B, T, J, W], sinks [H] or None. A single key/value head
    beside several query heads is whole everywhere. checked: False for kernels, whose results say nothing of the axes
    over which they differ. Without a mesh it is a plain call.
    """
    if not explicit_mesh():
        return body(operands, sight)
    heads = "." if operands[1].shape[2] == 1 and operands[0].shape[2] > 1 else "J"
    letters = ("BLHI", f"BT{heads}I", f"BT{heads}I", "H")
    specs = tuple(None if x is None else rules.act(names) for x, names in zip(operands, letters, strict=True))

    def local(operands, sight):
        # What enters a custom gradient has to vary over every axis over which its cotangents do.
        return body(jax.tree.map(varying, operands), jax.tree.map(varying, sight)) if checked else body(operands, sight)

    sight = jax.tree.map(lambda x: rules.constrain(x, "BL"), sight)  # places are made without a layout
    in_specs = (specs, jax.tree.map(lambda _: rules.act("BL"), sight))
    return jax.shard_map(local, in_specs=in_specs, out_specs=rules.act("BLHI"), check_vma=checked)(operands, sight)


def platform() -> str:
    """What the program is for: `cpu`, `gpu` or `tpu`. A mesh may be of devices that are only described."""
    mesh = jax.sharding.get_abstract_mesh()
    found = None if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform
    found = found or jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(found, found)
