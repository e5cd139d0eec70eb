"""Products on CPU: sums in float32, rounded once, forward and backward, on a mesh and inside one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparse_lm.products import einsum
from sparse_lm.sharding import DEFAULT

SIZES = {"B": 2, "L": 24, "D": 40, "F": 16, "E": 2, "R": 24, "H": 4, "I": 8}
CASES = ("BLD,DF->BLF", "ERD,EDF->ERF", "BLHI,HID->BLD", "BLD,FD->BLF")


def operands(subscripts: str, dtype=jnp.bfloat16) -> list[jax.Array]:
    """Both operands and a gradient of the result."""
    rng = np.random.default_rng(0)
    parts = subscripts.replace("->", ",").split(",")
    return [jnp.asarray(rng.normal(size=[SIZES[letter] for letter in part]), dtype) for part in parts]


def exact(subscripts: str, x, w, dy):
    """Result and both gradients in float64."""
    inputs, out = subscripts.split("->")
    one, two = inputs.split(",")
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    product = np.einsum
    return product(subscripts, x, w), product(f"{out},{two}->{one}", dy, w), product(f"{one},{out}->{two}", x, dy)


def both_ways(subscripts: str, function=einsum):
    def call(x, w, dy):
        y, pull = jax.vjp(lambda x, w: function(subscripts, x, w), x, w)
        return y, *pull(dy)

    return jax.jit(call)


def assert_rounded_once(got, expected):
    """Within half a unit in the last of bfloat16's 8 bits, and a little for the order of float32 sums."""
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=2**-8, atol=1e-4)


@pytest.mark.parametrize("subscripts", CASES)
def test_sums_are_rounded_once(subscripts):
    given = operands(subscripts)
    assert_rounded_once(both_ways(subscripts)(*given), exact(subscripts, *given))


def test_on_a_mesh(mesh_of):
    """Weights cut and rows cut: the sums over devices are made in float32 as well."""
    given = operands("BLD,DF->BLF")
    with jax.set_mesh(mesh_of(data=2, fsdp=1, model=2)):

        def layer(subscripts, x, w):
            return DEFAULT.einsum(subscripts, x, DEFAULT.gather(w, "DF"))

        placed = [DEFAULT.constrain(given[0], "BLD"), given[1], DEFAULT.constrain(given[2], "BLF")]
        placed[1] = DEFAULT.shard_parameters({"up_DF": given[1]})["up_DF"]
        got = both_ways("BLD,DF->BLF", layer)(*placed)
        assert jax.typeof(got[2]).sharding.spec == P("fsdp", "model")
        assert_rounded_once(got, exact("BLD,DF->BLF", *given))


def test_inside_a_shard_map(mesh_of):
    """A weight that all devices hold gets the sum of their gradients."""
    x, w, dy = operands("BLD,DF->BLF")
    with jax.set_mesh(mesh_of(data=2)):

        def layer(subscripts, x, w):
            return DEFAULT.per_shard(lambda x, w: einsum(subscripts, x, w), (x, w), ("BLD", "DF"), "BLF")

        got = both_ways("BLD,DF->BLF", layer)(DEFAULT.constrain(x, "BLD"), w, DEFAULT.constrain(dy, "BLF"))
    expected = exact("BLD,DF->BLF", x, w, dy)
    assert_rounded_once(got[:2], expected[:2])
    np.testing.assert_allclose(np.asarray(got[2], np.float64), expected[2], rtol=2**-6, atol=0.05)


@pytest.mark.parametrize("subscripts", CASES)
def test_float32_is_what_it_was(subscripts):
    given = operands(subscripts, jnp.float32)
    for one, other in zip(both_ways(subscripts)(*given), exact(subscripts, *given), strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=1e-5, atol=1e-5)


ROWS = ("BLD,DF->BLF", "BLF,FD->BLD", "BLD,FD->BLF", "ERD,EDF->ERF", "ERF,EFD->ERD")


def weight_gradient(subscripts, dtype):
    """The program of a weight's gradient, the product in it, and the shapes of that one's operands."""
    given = operands(subscripts, dtype)
    program = jax.make_jaxpr(lambda x, w, dy: jax.vjp(lambda w: einsum(subscripts, x, w), w)[1](dy))(*given)
    (product,) = [one for one in program.eqns if one.primitive.name == "dot_general"][2:]
    return program, product, [variable.aval.shape for variable in product.invars]


@pytest.mark.parametrize("subscripts", ROWS)
def test_sums_over_rows_turn_the_smaller_operand_round(subscripts):
    """D is wider than F, whichever is the result's: the products that sum over rows begin with F."""
    _, product, (first, second) = weight_gradient(subscripts, jnp.float32)
    assert (first[-1], second[-1]) == (SIZES["F"], SIZES["D"])
    (left, right), _ = product.params["dimension_numbers"]
    rows = {"B": (0, 1), "E": (1,)}[subscripts[0]]
    assert tuple(left) == tuple(right) == rows


@pytest.mark.parametrize("subscripts", ROWS)
def test_bfloat16_sums_over_rows_that_lie_last_in_memory(subscripts):
    """The first operand is turned round, and the compiler may lay out neither it nor the result differently."""
    program, product, (first, _) = weight_gradient(subscripts, jnp.bfloat16)
    (left, _), (batch, _) = product.params["dimension_numbers"]
    assert tuple(left) == tuple(range(len(first)))[-len(left) :] and tuple(batch) == tuple(range(len(batch)))
    assert {variable.aval.dtype.name for variable in product.invars} == {"bfloat16"}
    fixed = [one for one in program.eqns if one.primitive.name == "layout_constraint"]
    assert product.invars[0] in [one.outvars[0] for one in fixed]
    assert product.outvars[0] in [one.invars[0] for one in fixed]
    assert all(one.params["layout"].major_to_minor == tuple(range(one.invars[0].aval.ndim)) for one in fixed)


def test_rows_can_be_summed_over_forward():
    """As in a product that is itself a gradient."""
    x, _, dy = operands("BLD,DF->BLF")
    got = jax.jit(lambda x, dy: einsum("BLD,BLF->DF", x, dy, dtype=jnp.float32))(x, dy)
    expected = np.einsum("BLD,BLF->DF", np.asarray(x, np.float64), np.asarray(dy, np.float64))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_float32_result_of_bfloat16_has_gradients_of_bfloat16():
    """Logits: not rounded themselves, but their gradient is before it meets the other operand."""
    x, w, _ = operands("BLD,FD->BLF")
    dy = jnp.asarray(np.random.default_rng(1).normal(size=(SIZES["B"], SIZES["L"], SIZES["F"])), jnp.float32)
    y, dx, dw = both_ways("BLD,FD->BLF", functools.partial(einsum, dtype=jnp.float32))(x, w, dy)
    expected = exact("BLD,FD->BLF", x, w, dy.astype(jnp.bfloat16))
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, expected[0], rtol=1e-5, atol=1e-5)
    assert_rounded_once((dx, dw), expected[1:])


def test_a_gradient_has_a_gradient():
    x, w, dy = operands("BLD,DF->BLF", jnp.float32)

    def steepness(function):
        return jax.grad(lambda w: jnp.sum(jax.grad(lambda w: jnp.sum(jnp.sin(function(x, w)) * dy))(w) ** 2))(w)

    got, plain = (steepness(lambda x, w, f=f: f("BLD,DF->BLF", x, w)) for f in (einsum, jnp.einsum))
    np.testing.assert_allclose(got, plain, rtol=1e-4, atol=1e-2)


def test_a_policy_of_checkpoint_can_keep_a_product():
    x, w, dy = operands("BLD,DF->BLF", jnp.float32)

    def products(policy):
        def loss(x, w):
            return jnp.sum(jnp.sin(einsum("BLD,DF->BLF", x, w)) * dy)

        checkpointed = jax.checkpoint(loss, policy=policy)
        return str(jax.make_jaxpr(jax.grad(checkpointed, (0, 1)))(x, w)).count("dot_general[")

    kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    assert products(kept) == 3  # forward, and two gradients
    assert products(jax.checkpoint_policies.nothing_saveable) == 4


def test_other_types_are_left_alone():
    x, w, dy = operands("BLD,DF->BLF", jnp.float16)
    got, plain = both_ways("BLD,DF->BLF")(x, w, dy), both_ways("BLD,DF->BLF", jnp.einsum)(x, w, dy)
    assert all(np.array_equal(one, other) for one, other in zip(got, plain, strict=True))
    assert einsum("BLD,DF->BLF", *operands("BLD,DF->BLF")[:2], dtype=jnp.float32).dtype == jnp.float32
