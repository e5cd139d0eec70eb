"""Products of bfloat16 arrays that XLA computes well on a CPU: with float32 sums that are rounded once.

For CPUs with bfloat16 units XLA has fast kernels, but not for every form. With a bfloat16 result it takes a slow one;
with a float32 result that is rounded afterwards it does not. Where rows are summed over, as in a weight's gradient,
bfloat16 is slow whatever the result, and float32 operands are faster. Numbers: docs/performance.md.

On GPU and TPU the sums are float32 in any case, and the plain product is the one that their compilers know.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sparse_lm.mesh import explicit_mesh, platform, varying


def einsum(subscripts: str, *operands: jax.Array, out_sharding=None, dtype=None) -> jax.Array:
    """`jnp.einsum` in the form that the platform computes best. dtype: of sums and result; None is the operands'."""
    if (
        dtype is None
        and len(operands) == 2
        and {x.dtype.name for x in operands} == {"bfloat16"}
        and platform() == "cpu"
    ):
        x, w = operands if explicit_mesh() else map(varying, operands)
        return bfloat16_einsum(subscripts, x, w, out_sharding)
    return jnp.einsum(subscripts, *operands, out_sharding=out_sharding, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def bfloat16_einsum(subscripts: str, x: jax.Array, w: jax.Array, out_sharding=None) -> jax.Array:
    """`jnp.einsum` of two bfloat16 operands, summed in float32 and rounded once, with gradients of the same kind.

    Every letter of an operand has to be in the other one or in the result.
    """
    total = jnp.einsum(subscripts, x, w, out_sharding=out_sharding, preferred_element_type=jnp.float32)
    return total.astype(jnp.bfloat16)


def _forward(subscripts, x, w, out_sharding):
    return bfloat16_einsum(subscripts, x, w, out_sharding), (x, w)


def _backward(subscripts, out_sharding, saved, dy):
    x, w = saved
    inputs, result = subscripts.split("->")
    left, right = inputs.split(",")

    def gradient(subscripts: str, one: jax.Array, other: jax.Array, like: jax.Array) -> jax.Array:
        letters, result = subscripts.split("->")
        first, second = letters.split(",")
        if first[0] not in result and second[0] not in result:  # rows are summed over
            one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        sharding = None if out_sharding is None else jax.typeof(like).sharding.spec
        total = jnp.einsum(subscripts, one, other, out_sharding=sharding, preferred_element_type=jnp.float32)
        return total.astype(jnp.bfloat16)

    return gradient(f"{result},{right}->{left}", dy, w, x), gradient(f"{left},{result}->{right}", x, dy, w)


bfloat16_einsum.defvjp(_forward, _backward)
