"""Which implementation runs where, what is refused, and equality over meshes."""

from __future__ import annotations

import attend_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend_oracle import FEATURES
from jax.sharding import NamedSharding

from sparse_lm.config import ConfigError
from sparse_lm.mesh import platform
from sparse_lm.nn.attend import Softmax, attend, continued_sight, implementation_of, row_sight
from sparse_lm.nn.attend import choose as choose_module
from sparse_lm.nn.attend.kernels import splash
from sparse_lm.nn.attend.shards import per_shard
from sparse_lm.sharding import DEFAULT

ROW = row_sight(jnp.ones((1, 8), jnp.int32))
CACHE = continued_sight(jnp.ones((1, 1), jnp.int32), jnp.ones((1, 8), jnp.int32), 0)


@pytest.mark.parametrize(
    ("where", "asked", "length", "expected"),
    [
        ("cpu", "auto", 512, "reference"),  # one block holds all of it
        ("cpu", "auto", 513, "chunked"),
        ("gpu", "auto", 4096, "chunked"),
        ("tpu", "auto", 4096, "splash"),
        ("tpu", "auto", 4097, "chunked"),  # no block divides it
        ("tpu", "chunked", 16, "chunked"),
        ("tpu", "splash", 16, "splash"),
        ("gpu", "cudnn", 16, "cudnn"),
        ("cpu", "reference", 9999, "reference"),
    ],
)
def test_choice(where, asked, length, expected, monkeypatch):
    monkeypatch.setattr(choose_module, "platform", lambda: where)
    assert implementation_of(Softmax(asked), ROW, (length, length, 64, 64), False) == expected


def test_kernels_leave_caches_to_the_others():
    for asked in ("auto", "splash", "cudnn"):
        assert implementation_of(Softmax(asked), CACHE, (1, 9999, 64, 64), False) == "reference"
        assert implementation_of(Softmax(asked), CACHE, (600, 9999, 64, 64), False) == "chunked"


def test_dropout_of_weights_is_in_the_reference_alone():
    for asked in ("auto", "reference"):
        assert implementation_of(Softmax(asked, rate=0.5), ROW, (9999, 9999, 4, 4), True) == "reference"
    for asked in ("chunked", "splash", "cudnn"):
        with pytest.raises(ConfigError, match=rf"model.dropout=0.5: is not in {asked} attention"):
            implementation_of(Softmax(asked, rate=0.5), ROW, (8, 8, 4, 4), True)


@pytest.mark.parametrize(("asked", "where"), [("splash", "tpu"), ("cudnn", "gpu")])
def test_a_kernel_of_another_platform_is_refused(asked, where):
    with pytest.raises(ConfigError, match=rf"model.heads.implementation='{asked}': runs on {where} and this is cpu"):
        implementation_of(Softmax(asked), ROW, (8, 8, 4, 4), False)


@pytest.mark.parametrize("width", [12, 136])
def test_cudnn_has_widths(width, monkeypatch):
    monkeypatch.setattr(choose_module, "platform", lambda: "gpu")
    with pytest.raises(ConfigError, match=rf"model.head_dim={width}: cudnn needs multiples of 8 up to 128"):
        implementation_of(Softmax("cudnn"), ROW, (8, 8, width, 8), False)


def test_the_platform_is_that_of_the_mesh(mesh_of):
    assert platform() == jax.default_backend() == "cpu"
    with jax.set_mesh(mesh_of(data=2)):
        assert platform() == "cpu"
    with jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh((1,), ("data",), abstract_device=jax.sharding.AbstractDevice("TPU v5p", None, "tpu"))
    ):
        assert platform() == "tpu"


def gradients(implementation, given, segments, positions, features):
    """Result and gradients."""

    def value(given):
        sight = row_sight(segments).within(features.window, features.chunk, positions)
        softmax = Softmax(implementation, features.scale, features.soft_cap, block=4)
        query, key, value, sinks = (given[name] for name in ("query", "key", "value", "sinks"))
        mixed = attend(query, key, value, sight, softmax, DEFAULT, sinks)
        return jnp.sum(mixed**2), mixed

    return jax.jit(jax.grad(value, has_aux=True))(given)


@pytest.mark.parametrize("implementation", ["reference", "chunked"])
@pytest.mark.parametrize(("kv_heads", "sizes"), [(2, {"data": 2, "model": 2}), (1, {"fsdp": 2, "model": 4})])
def test_the_same_on_a_mesh(implementation, kv_heads, sizes, mesh_of):
    given = {name: jnp.asarray(x, jnp.float32) for name, x in oracle.operands(kv_heads).items()}
    segments, positions = jnp.asarray(oracle.SEGMENTS), jnp.asarray(oracle.POSITIONS)
    expected = gradients("reference", given, segments, positions, FEATURES["all"])
    heads = "J" if kv_heads > 1 else "."
    letters = {"query": "BLHI", "key": f"BT{heads}I", "value": f"BT{heads}I", "sinks": "H"}
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(x, NamedSharding(mesh, DEFAULT.act(letters[name]))) for name, x in given.items()}
        rows = [jax.device_put(x, NamedSharding(mesh, DEFAULT.act("B."))) for x in (segments, positions)]
        found = gradients(implementation, placed, rows[0], rows[1], FEATURES["all"])
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_splash_interpreted_on_a_mesh(mesh_of):
    """Gradients of what is whole on several devices are summed, although the kernel's results declare nothing."""
    rng = np.random.default_rng(0)
    given = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in [(2, 128, 2, 8)] * 3 + [(2,)])

    def value(operands, rules_apply):
        sight = row_sight(jnp.ones((2, 128), jnp.int32))
        mixed = rules_apply(lambda operands, sight, _: splash(operands, sight, (0.3, None), 128, True), operands, sight)
        return jnp.sum(mixed**2)

    def plain(body, operands, sight):
        return body(operands, sight, None)

    def cut(body, operands, sight):
        return per_shard(body, operands, sight, DEFAULT, checked=False)

    expected = jax.jit(jax.grad(value), static_argnums=1)(given, plain)
    mesh = mesh_of(data=2, model=2)
    with jax.set_mesh(mesh):
        letters = ("BLHI", "BTHI", "BTHI", "H")
        placed = tuple(
            jax.device_put(x, NamedSharding(mesh, DEFAULT.act(names))) for x, names in zip(given, letters, strict=True)
        )
        found = jax.jit(jax.grad(value), static_argnums=1)(placed, cut)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5)
