"""Experts that the `expert` axis cannot share out evenly: runs of neighbouring devices hold them all, once each.

With E experts on X devices a run has gcd(E, X) of them, and every run its own tokens: experts have X / gcd(E, X)
replicas. They are stored once, cut along F over the whole axis, and copied to where they are used in every step, as
FSDP does along D; the gradients of the replicas are summed on the way back.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from sparse_lm.mesh import axis_index, manual_axis_size


def sharers(num_experts: int) -> int:
    """Devices that have all experts once: all of the `expert` axis where it divides them, else a part of it."""
    return math.gcd(num_experts, manual_axis_size("expert"))


def place(devices: int) -> jax.Array | int:
    """This device's place in its run of that many."""
    return axis_index("expert") % devices


def runs(devices: int) -> list[list[int]] | None:
    """The runs of that many neighbours along the `expert` axis, for a collective; None where one run is all."""
    total = manual_axis_size("expert")
    return None if devices == total else [list(range(i, i + devices)) for i in range(0, total, devices)]


def own_experts(experts, specs, dtype):
    """Inside a `shard_map`: of experts that are cut along F, or not at all, those that this device computes, whole.

    specs: how they are stored. dtype: of the result; casting before the exchange halves the bytes for bf16.
    """
    total, devices = manual_axis_size("expert"), sharers(experts.num_experts)
    if devices == total:
        return experts
    count = experts.num_experts // devices

    def own(leaf, spec):
        leaf = leaf.astype(dtype)
        cut = [dim for dim, axes in enumerate(spec) if axes is not None and "expert" in axes]
        if not cut:  # a bias along D: small, and on every device
            return jax.lax.dynamic_slice_in_dim(leaf, place(devices) * count, count)
        copies = jnp.concatenate([leaf] * (total // devices))  # for every device its experts, in the order of devices
        return jax.lax.all_to_all(copies, "expert", split_axis=0, concat_axis=cut[0], tiled=True)

    return jax.tree.map(own, experts, specs)
