"""Matrix products in the forms that XLA computes well on a CPU.

For CPUs with bfloat16 units XLA has fast kernels, but not for every form. With a bfloat16 result it takes a slow one;
with a float32 result that is rounded afterwards it does not. Where rows are summed over, as in a weight's gradient,
it turns bfloat16 to float32, unless the first operand lies in memory with its rows last. XLA would undo a mere
transposition, so that the order in memory is prescribed.

A sum over rows wants its first operand turned round in float32 too, and XLA computes whatever leads to that operand,
such as the gradient of an activation, in the turned order, which is slow: so the smaller operand comes first. JAX's own
gradient puts that of the result first, whatever its size. Numbers: docs/performance.md.

On GPU and TPU the sums are float32 in any case, and the plain product is the one that their compilers know.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from sparse_lm.mesh import explicit_mesh, platform, varying

_DTYPES = ({"bfloat16"}, {"float32"})
_Named = tuple[str, jax.Array]  # the letters of an operand's axes, and the operand


def einsum(subscripts: str, *operands: jax.Array, out_sharding=None, dtype=None) -> jax.Array:
    """`jnp.einsum` in the form that the platform computes best. dtype: of sums and result; None is the operands'.

    On a CPU it has no forward-mode derivative (`jax.jvp`).
    """
    names = {x.dtype.name for x in operands}
    known = dtype is None or jnp.dtype(dtype).name in {"float32", *names}
    if known and len(operands) == 2 and names in _DTYPES and platform() == "cpu":
        x, w = operands if explicit_mesh() else map(varying, operands)
        return cpu_einsum(subscripts, x, w, out_sharding, dtype or x.dtype)
    return jnp.einsum(subscripts, *operands, out_sharding=out_sharding, preferred_element_type=dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3, 4))
def cpu_einsum(subscripts: str, x: jax.Array, w: jax.Array, out_sharding, dtype) -> jax.Array:
    """`jnp.einsum` of two operands of one dtype, summed in float32 and rounded once, with gradients of the same kind.

    Every letter of an operand has to be in the other one or in the result. dtype: of the result; its gradient is
    rounded to that of the operands.
    """
    return _product(subscripts, x, w, out_sharding).astype(dtype)


def _forward(subscripts, x, w, out_sharding, dtype):
    # Not the function with the gradient: `jax.checkpoint` would see no product in it that it could keep.
    return _product(subscripts, x, w, out_sharding).astype(dtype), (x, w)


def _backward(subscripts, out_sharding, dtype, saved, dy):
    x, w = saved
    dy = dy.astype(x.dtype)
    left, right, result = _letters(subscripts)
    specs = [None if out_sharding is None else jax.typeof(one).sharding.spec for one in saved]
    dx = _product(f"{result},{right}->{left}", dy, w, specs[0])
    dw = _product(f"{left},{result}->{right}", x, dy, specs[1])
    return dx.astype(x.dtype), dw.astype(w.dtype)


def _letters(subscripts: str) -> tuple[str, str, str]:
    """Those of both operands and of the result."""
    inputs, result = subscripts.split("->")
    first, second = inputs.split(",")
    return first, second, result


def _product(subscripts: str, one: jax.Array, other: jax.Array, spec) -> jax.Array:
    """In float32."""
    first, second, result = _letters(subscripts)
    if first[-1] in result and second[-1] in result:  # rows are summed over
        return _sum_over_rows((first, one), (second, other), result, spec)
    return _in_order((first, one), (second, other), result, spec)


def _sum_over_rows(left: _Named, right: _Named, result: str, spec) -> jax.Array:
    """The product whose first operand has to be turned round: the one that takes less moving in all."""
    (first, one), (second, other) = left, right
    bfloat16 = one.dtype == jnp.bfloat16
    sizes = dict(zip(first + second, one.shape + other.shape, strict=True))
    turned_result = 2 * math.prod(sizes[letter] for letter in result) if bfloat16 else 0
    if one.size > other.size + turned_result:
        (first, one), (second, other) = right, left
    if bfloat16:
        rows = [letter for letter in first if letter not in result]
        batch = [letter for letter in first if letter in second and letter in result]
        own = [letter for letter in first if letter not in second]
        order = "".join([*batch, *own, *rows])
        one, first = in_memory(jnp.transpose(one, [first.index(letter) for letter in order])), order
    return _in_order((first, one), (second, other), result, spec)


def in_memory(x: jax.Array) -> jax.Array:
    """The same, whose last axis lies next to each other in memory whatever the compiler would prefer."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def _in_order(left: _Named, right: _Named, result: str, spec) -> jax.Array:
    """`jnp.einsum`, which would exchange its operands where that saves turning the result round."""
    (first, one), (second, other) = left, right
    shared = [letter for letter in first if letter in second]
    natural = [letter for letter in dict.fromkeys([*shared, *first, *second]) if letter in result]
    if spec is not None:
        spec = type(spec)(*(spec[result.index(letter)] for letter in natural))
    subscripts = f"{first},{second}->{''.join(natural)}"
    product = jnp.einsum(subscripts, one, other, out_sharding=spec, preferred_element_type=jnp.float32)
    if one.dtype == jnp.bfloat16:  # XLA fails where it would rather have such a product turned round
        product = in_memory(product)
    return jnp.transpose(product, [natural.index(letter) for letter in result])


cpu_einsum.defvjp(_forward, _backward)
