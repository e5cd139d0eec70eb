"""Matrix products in the forms that XLA computes well on a CPU.

For CPUs with bfloat16 units XLA has fast kernels, but not for every form. With a bfloat16 result it takes a slow one;
with a float32 result that is rounded afterwards it does not. Where rows are summed over, as in a weight's gradient,
bfloat16 is slow whatever the result, and float32 operands are faster.

A sum over rows wants its first operand turned round, and XLA computes whatever leads to that operand, such as the
gradient of an activation, in the turned order, which is slow: so the smaller operand comes first. JAX's own gradient
puts that of the result first, whatever its size. Numbers: docs/performance.md.

On GPU and TPU the sums are float32 in any case, and the plain product is the one that their compilers know.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from sparse_lm.mesh import explicit_mesh, platform, varying

_DTYPES = ({"bfloat16"}, {"float32"})


def einsum(subscripts: str, *operands: jax.Array, out_sharding=None, dtype=None) -> jax.Array:
    """`jnp.einsum` in the form that the platform computes best. dtype: of sums and result; None is the operands'.

    On a CPU it has no forward-mode derivative (`jax.jvp`).
    """
    names = {x.dtype.name for x in operands}
    own = dtype is None or {jnp.dtype(dtype).name} == names
    if own and len(operands) == 2 and names in _DTYPES and platform() == "cpu":
        x, w = operands if explicit_mesh() else map(varying, operands)
        return cpu_einsum(subscripts, x, w, out_sharding)
    return jnp.einsum(subscripts, *operands, out_sharding=out_sharding, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def cpu_einsum(subscripts: str, x: jax.Array, w: jax.Array, out_sharding=None) -> jax.Array:
    """`jnp.einsum` of two operands of one dtype, summed in float32 and rounded once, with gradients of the same kind.

    Every letter of an operand has to be in the other one or in the result.
    """
    return _product(subscripts, x, w, out_sharding)


def _product(subscripts, x, w, out_sharding):
    total = jnp.einsum(subscripts, x, w, out_sharding=out_sharding, preferred_element_type=jnp.float32)
    return total.astype(x.dtype)


def _forward(subscripts, x, w, out_sharding):
    # Not the function with the gradient: `jax.checkpoint` would see no product in it that it could keep.
    return _product(subscripts, x, w, out_sharding), (x, w)


def _backward(subscripts, out_sharding, saved, dy):
    x, w = saved
    inputs, result = subscripts.split("->")
    left, right = inputs.split(",")

    def gradient(letters: tuple[str, str, str], one: jax.Array, other: jax.Array, like: jax.Array) -> jax.Array:
        first, second, result = letters
        if first[0] not in result and second[0] not in result:  # rows are summed over
            one, other = one.astype(jnp.float32), other.astype(jnp.float32)
        if first[-1] in result and second[-1] in result and one.size > other.size:
            (first, one), (second, other) = (second, other), (first, one)
        sharding = None if out_sharding is None else jax.typeof(like).sharding.spec
        return _in_order(f"{first},{second}->{result}", one, other, sharding).astype(like.dtype)

    return gradient((result, right, left), dy, w, x), gradient((left, result, right), x, dy, w)


def _in_order(subscripts: str, one: jax.Array, other: jax.Array, spec) -> jax.Array:
    """`jnp.einsum`, which would exchange its operands where that saves turning the result round."""
    inputs, result = subscripts.split("->")
    first, second = inputs.split(",")
    shared = [letter for letter in first if letter in second]
    natural = [letter for letter in dict.fromkeys([*shared, *first, *second]) if letter in result]
    if spec is not None:
        spec = type(spec)(*(spec[result.index(letter)] for letter in natural))
    product = jnp.einsum(
        f"{inputs}->{''.join(natural)}", one, other, out_sharding=spec, preferred_element_type=jnp.float32
    )
    return jnp.transpose(product, [natural.index(letter) for letter in result])


cpu_einsum.defvjp(_forward, _backward)
