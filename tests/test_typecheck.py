"""The checker of array annotations: what it takes, what it refuses, and that the whole package is under it."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
import typecheck
from flax import nnx
from jaxtyping import Array, Float, Int, jaxtyped

import sparse_lm.batch

if TYPE_CHECKING:
    from nowhere import Thing  # pyright: ignore[reportMissingImports]

checked = jaxtyped(typechecker=typecheck.check)


@checked
def matmul(x_BD: Float[Array, "B D"], w_DF: Float[Array, "D F"], thing: Thing | None = None) -> Float[Array, "B F"]:
    return x_BD @ w_DF


@checked
def forgets_an_axis(x_BD: Float[Array, "B D"]) -> tuple[Float[Array, " B"], int]:
    return x_BD, 0


@checked
def maybe(x_B: Int[Array, " B"] | None, scale: float = 1) -> Int[Array, " B"] | None:
    return x_B


class Layer(nnx.Module):
    @checked
    def __init__(self, width: int):
        self.weight = nnx.Param(jnp.ones((width, width)))

    @checked
    def __call__(self, x_BD: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return x_BD @ self.weight[...]


@checked
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    x_B: Float[Array, " B"]
    y_B: Float[Array, " B"]


def test_eight_devices_and_a_cache():
    assert jax.device_count() == 8
    assert jax.config.values["jax_compilation_cache_dir"] == os.environ["JAX_COMPILATION_CACHE_DIR"]


def test_the_package_was_imported_under_the_hook():
    assert type(sparse_lm.batch.__spec__.loader).__name__ == "_JaxtypingLoader"


@pytest.mark.parametrize("make", [np.ones, jnp.ones], ids=["numpy", "jax"])
def test_takes_numpy_and_jax_arrays(make):
    assert matmul(make((2, 3)), make((3, 4))).shape == (2, 4)


def test_takes_tracers_and_abstract_values():
    x_BD, w_DF = jnp.ones((2, 3)), jnp.ones((3, 4))
    assert jax.eval_shape(matmul, x_BD, w_DF).shape == (2, 4)
    assert jax.jit(jax.grad(lambda w: matmul(x_BD, w).sum()))(w_DF).shape == (3, 4)
    assert jax.vmap(matmul, in_axes=(0, None))(jnp.ones((5, 2, 3)), w_DF).shape == (5, 2, 4)


def test_modules_go_through_transformations():
    gradient = jax.grad(lambda layer: layer(jnp.ones((2, 3))).sum())(Layer(3))
    np.testing.assert_array_equal(gradient.weight[...], 2 * np.ones((3, 3)))


def test_dataclasses_may_be_rebuilt_around_anything():
    pair = Pair(jnp.ones(3), jnp.ones(3))
    assert jax.tree.map(lambda x: x.shape, pair) == Pair((3,), (3,))  # pyright: ignore[reportArgumentType]


def test_unresolvable_and_plain_annotations_are_left_alone():
    assert matmul(np.ones((1, 1)), np.ones((1, 1)), "not a Thing") == 1  # pyright: ignore[reportArgumentType]
    assert maybe(None, scale="seven") is None  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "call",
    [
        lambda: matmul(jnp.ones((2, 3)), jnp.ones((4, 4))),
        lambda: matmul(jnp.ones(3), jnp.ones((3, 4))),
        lambda: matmul(jnp.ones((2, 3), int), jnp.ones((3, 4))),
        lambda: matmul([[1.0]], jnp.ones((1, 4))),  # pyright: ignore[reportArgumentType]
        lambda: forgets_an_axis(jnp.ones((2, 3))),
        lambda: maybe(jnp.ones(3)),
        lambda: Layer(3)(jnp.ones(3)),
        lambda: jax.jit(matmul)(jnp.ones((2, 3)), jnp.ones((4, 4))),
    ],
    ids=["sizes", "rank", "dtype", "list", "result", "optional", "method", "tracer"],
)
def test_refuses(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_mesh_of_takes_the_devices_it_needs(mesh_of):
    others = dict.fromkeys(("replica", "stage", "fsdp", "context", "model"), 1)
    assert dict(mesh_of(data=2, expert=2).shape) == {"data": 2, "expert": 2, **others}
    assert mesh_of().devices.size == 1
    with pytest.raises(pytest.fail.Exception, match="needs 16 devices"):
        mesh_of(data=16)
