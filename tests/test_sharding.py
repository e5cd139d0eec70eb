"""The table of sharding rules, meshes, and what a weight and its gradient look like on eight devices and on none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sparse_lm.dims import LETTERS
from sparse_lm.mesh import BATCH_AXES, TOKEN_AXES, explicit_mesh
from sparse_lm.sharding import (
    DEFAULT,
    Rules,
    abstract_sharded,
    lead_like,
    letters_of,
    put,
    staged,
)

MESHES = [
    {"data": 8},
    {"fsdp": 8},
    {"expert": 8},
    {"model": 8},
    {"data": 2, "fsdp": 2, "model": 2},
    {"fsdp": 2, "expert": 2, "model": 2},
]
each_mesh = pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "-".join(f"{k}{v}" for k, v in sizes.items()))


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# The table


@pytest.mark.parametrize(
    ("kind", "letters", "expected"),
    [
        ("act", "BLD", P(BATCH_AXES, "context", None)),
        ("act", "BLHI", P(BATCH_AXES, "context", "model", None)),
        ("act", "GSV", P(TOKEN_AXES, None, "model")),
        ("act", ".D", P(None, None)),
        ("act", "", P()),
        ("param", "DF", P("fsdp", "model")),
        ("param", "NEDF", P("stage", "expert", "fsdp", "model")),
        ("param", "D", P("fsdp")),
        ("param", ".D", P(None, "fsdp")),
        ("gathered", "NEDF", P("stage", "expert", None, "model")),
        ("gathered", "DF", P(None, "model")),
    ],
)
def test_default_rules(kind, letters, expected):
    assert getattr(DEFAULT, kind)(letters) == expected


def test_every_letter_of_a_parameter_is_cut_once():
    rules = Rules(activations=(), parameters=(("D", "model"), ("V", None)), stored=("fsdp",), dense=("data",))
    assert rules.param("DF") == P(("model", "fsdp", "data"), None)
    assert rules.param("DP") == P(("model", "fsdp", "data"), None)  # storage cuts the first letter that it may
    assert rules.gathered("DF") == P("model", None)
    assert rules.param("VB") == P(None, None)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"activations": (("X", "data"),)}, "sharding rule for unknown axis 'X'; known: B, L"),
        ({"parameters": (("x", "data"),)}, "unknown axis 'x'"),
        (
            {"activations": (("B", "batch"),)},
            r"'B' -> unknown mesh axis 'batch'; known: \('replica', 'stage'",
        ),
        ({"parameters": (("D", ("fsdp", "nodes")),)}, "'D' -> unknown mesh axis 'nodes'"),
        ({"stored": ("fsdp", "nodes")}, "'stored' -> unknown mesh axis 'nodes'"),
        ({"state": ("nodes",)}, "'state' -> unknown mesh axis 'nodes'"),
    ],
)
def test_rules_refuse_unknown_names(rules, message):
    with pytest.raises(ValueError, match=message):
        Rules(**{"activations": (), "parameters": (), **rules})


@pytest.mark.parametrize("kind", ["act", "param", "gathered"])
def test_specs_refuse_unknown_letters(kind):
    with pytest.raises(ValueError, match=r"unknown axis 'x' in 'BxD'; known: B, .* and '\.'"):
        getattr(DEFAULT, kind)("BxD")


@pytest.mark.parametrize(
    ("kind", "letters", "axis"), [("act", "FV", "model"), ("param", "HDF", "model"), ("act", "BG", "data")]
)
def test_specs_refuse_a_mesh_axis_used_twice(kind, letters, axis):
    with pytest.raises(
        ValueError, match=rf"'{letters}' would use mesh axis .*'{axis}'.* twice; change the rules table"
    ):
        getattr(DEFAULT, kind)(letters)


# Weights and activations, and what knows of a mesh


def test_mesh_awareness(mesh_of):
    assert not explicit_mesh()
    with jax.set_mesh(mesh_of(data=2, model=4)):
        assert explicit_mesh()
        inside = []
        jax.shard_map(lambda x: (inside.append(explicit_mesh()), x)[1], in_specs=P(), out_specs=P())(jnp.ones(2))
        assert inside == [False]
    assert not explicit_mesh()


@each_mesh
def test_gather_and_its_gradient(mesh_of, sizes):
    weight, x = normal(0, 8, 16), normal(1, 8, 8)

    def loss(weight):
        used = DEFAULT.gather(weight, "DF", jnp.bfloat16)
        assert used.dtype == jnp.bfloat16
        if explicit_mesh():
            assert jax.typeof(used).sharding.spec == P(None, "model")
        return DEFAULT.einsum("BD,DF->BF", DEFAULT.constrain(x, "BD"), used.astype(jnp.float32)).sum()

    expected = np.broadcast_to(np.asarray(x).sum(0)[:, None], (8, 16))
    np.testing.assert_allclose(jax.grad(loss)(weight), expected, rtol=1e-2, atol=1e-2)
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        stored = jax.device_put(weight, NamedSharding(mesh, DEFAULT.param("DF")))
        gradient = jax.jit(jax.grad(loss))(stored)
        assert gradient.dtype == jnp.float32
        assert jax.typeof(gradient).sharding.spec == P("fsdp", "model")
        np.testing.assert_allclose(gradient, expected, rtol=1e-2, atol=1e-2)


def test_whole_is_on_every_device(mesh_of):
    weight = normal(0, 8, 16)
    np.testing.assert_array_equal(DEFAULT.whole(weight), weight)
    with jax.set_mesh(mesh_of(fsdp=4, model=2)):
        stored = DEFAULT.shard_parameters({"up_DF": weight})["up_DF"]
        assert stored.addressable_shards[0].data.shape == (2, 8)
        whole = DEFAULT.whole(stored, jnp.bfloat16)
        assert whole.dtype == jnp.bfloat16
        assert all(shard.data.shape == (8, 16) for shard in whole.addressable_shards)


@each_mesh
def test_constrain_moves_and_keeps_values(mesh_of, sizes):
    x = normal(0, 8, 6, 8, 2)
    assert DEFAULT.constrain(x, "BLHI") is x
    with jax.set_mesh(mesh_of(**sizes)):
        moved = DEFAULT.constrain(x, "BLHI")
        assert jax.typeof(moved).sharding.spec == P(BATCH_AXES, "context", "model", None)
        np.testing.assert_array_equal(moved, x)
        rows = 8 // (sizes.get("data", 1) * sizes.get("fsdp", 1) * sizes.get("expert", 1))
        assert moved.addressable_shards[0].data.shape == (rows, 6, 8 // sizes.get("model", 1), 2)


@each_mesh
def test_einsum_sums_over_a_cut_axis(mesh_of, sizes):
    hidden_BF, down_FD = normal(0, 8, 16), normal(1, 16, 4)
    expected = np.asarray(hidden_BF) @ np.asarray(down_FD)
    np.testing.assert_allclose(DEFAULT.einsum("BF,FD->BD", hidden_BF, down_FD), expected, rtol=1e-5, atol=1e-5)
    with jax.set_mesh(mesh_of(**sizes)):
        out = DEFAULT.einsum(
            "BF,FD->BD", DEFAULT.constrain(hidden_BF, "BF"), jax.sharding.reshard(down_FD, DEFAULT.gathered("FD"))
        )
        assert jax.typeof(out).sharding.spec == P(BATCH_AXES, None)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_reshape_and_take_rows(mesh_of):
    x, table, rows = normal(0, 8, 6), normal(1, 10, 4), jnp.asarray([[9, 0], [3, 3]] * 4)

    def check():
        out = DEFAULT.reshape(DEFAULT.constrain(x, "BD"), (8, 3, 2), "BHI")
        np.testing.assert_array_equal(out, np.asarray(x).reshape(8, 3, 2))
        taken = DEFAULT.take_rows(table, DEFAULT.constrain(rows, "BL"), "BLD")
        np.testing.assert_array_equal(taken, np.asarray(table)[np.asarray(rows)])
        return out, taken

    check()
    with jax.set_mesh(mesh_of(data=4, expert=2)):
        out, taken = check()
        assert jax.typeof(out).sharding.spec == P(BATCH_AXES, "model", None)
        assert jax.typeof(taken).sharding.spec == P(BATCH_AXES, "context", None)


def test_put_cuts_a_host_array(mesh_of):
    x = np.arange(32).reshape(8, 4)
    placed = put(mesh_of(data=2, fsdp=2, model=2), DEFAULT, x, "BL")
    assert jax.typeof(placed).sharding.spec == P(BATCH_AXES, "context")
    np.testing.assert_array_equal(placed, x)
    for shard in placed.addressable_shards:
        assert shard.data.shape == (2, 4)
        np.testing.assert_array_equal(shard.data, x[shard.index])


# Trees of parameters


@pytest.mark.parametrize(
    ("name", "ndim", "expected"),
    [
        ("up_EDF", 3, "EDF"),
        ("up_EDF", 4, "NEDF"),
        ("up_EDF", 2, None),
        ("up_EDF", 5, None),
        ("layers/0/mlp/w_gate_DF", 2, "DF"),
        ("layers/0/up_DF/value", 2, "DF"),
        ("scale_D", 1, "D"),
        ("scale", 1, None),
        ("count", 0, None),
        ("running_mean", 1, None),
        ("trailing_", 1, None),
    ],
)
def test_letters_of(name, ndim, expected):
    assert letters_of(name, ndim) == expected


def test_letters_of_a_key_path():
    ((path, leaf),) = jax.tree_util.tree_leaves_with_path({"block": [{"up_DF": np.ones((2, 3))}]})
    assert letters_of(path, leaf.ndim) == "DF"


def test_parameter_specs_and_shards(mesh_of):
    tree = {"up_EDF": normal(0, 2, 8, 4), "layers": {"up_EDF": normal(1, 3, 2, 8, 4)}, "count": jnp.zeros(())}
    assert DEFAULT.parameter_specs(tree) == {
        "up_EDF": P("expert", "fsdp", "model"),
        "layers": {"up_EDF": P("stage", "expert", "fsdp", "model")},
        "count": P(),
    }
    assert DEFAULT.shard_parameters(tree)["up_EDF"] is tree["up_EDF"]
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, model=2)):
        cut = DEFAULT.shard_parameters(tree)
        assert cut["up_EDF"].addressable_shards[0].data.shape == (1, 4, 2)
        assert cut["layers"]["up_EDF"].addressable_shards[0].data.shape == (3, 1, 4, 2)
        np.testing.assert_array_equal(cut["up_EDF"], tree["up_EDF"])
        assert jax.typeof(cut["layers"]["up_EDF"]).sharding.spec[0] is None  # a single stage leaves no trace
    with jax.set_mesh(mesh_of(stage=3)):
        cut = DEFAULT.shard_parameters(tree)["layers"]["up_EDF"]
        assert cut.addressable_shards[0].data.shape == (1, 2, 8, 4)
        assert jax.typeof(staged(cut, cut=False)).sharding.spec == P(None, "expert", "fsdp", "model")
        assert jax.typeof(staged(staged(cut, cut=False))).sharding == jax.typeof(cut).sharding


def test_an_axis_that_cannot_be_cut_evenly_stays_whole(mesh_of):
    """A router that chooses among six experts, two of them free, on a mesh that cuts four."""
    tree = {"weight_DE": normal(0, 4, 6), "up_EDF": normal(1, 4, 4, 8)}
    mesh = mesh_of(fsdp=2, expert=4)
    with jax.set_mesh(mesh):
        stored = DEFAULT.shard_parameters(tree)
        assert jax.typeof(stored["weight_DE"]).sharding.spec == P("fsdp", None)
        assert stored["up_EDF"].addressable_shards[0].data.shape == (1, 2, 8)
        np.testing.assert_array_equal(stored["weight_DE"], tree["weight_DE"])
    shapes = abstract_sharded(jax.eval_shape(lambda: tree), DEFAULT, mesh)
    assert shapes["weight_DE"].sharding.spec == P("fsdp", None)
    assert shapes["up_EDF"].sharding.spec == P("expert", "fsdp", "model")


def test_experts_that_cannot_be_shared_out_are_cut_along_their_hidden_width(mesh_of):
    tree = {"up_EDF": normal(0, 6, 4, 8), "layers": {"down_EFD": normal(1, 3, 2, 8, 4)}, "odd_EF": normal(2, 6, 7)}
    mesh = mesh_of(expert=4, model=2)
    assert DEFAULT.parameter_specs(tree, mesh) == {
        "up_EDF": P(None, "fsdp", ("model", "expert")),
        "layers": {"down_EFD": P(None, None, ("model", "expert"), "fsdp")},
        "odd_EF": P(None, None),
    }
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(DEFAULT.shard_parameters(tree)["up_EDF"], tree["up_EDF"])


def test_the_default_table_is_about_known_letters():
    letters = {letter for letter, _ in (*DEFAULT.activations, *DEFAULT.parameters)}
    assert letters <= set(LETTERS)
    assert "S" not in letters and "C" not in letters, "sorts and cumulative sums over a group stay on one device"


def test_a_length_that_the_mesh_does_not_divide_stays_whole(mesh_of):
    """As that of one new token in generation."""
    assert DEFAULT.ways("L", 6) == 1  # without a mesh
    x, weight = normal(0, 2, 3, 4), normal(1, 4, 6)
    with jax.set_mesh(mesh_of(data=2, context=4)):
        assert DEFAULT.ways("L", 8) == 4 and DEFAULT.ways("L", 6) is None
        assert DEFAULT.act("BLD", (2, 8, 4)) == DEFAULT.act("BLD") == P(BATCH_AXES, "context", None)
        placed = DEFAULT.constrain(x, "BLD")
        product = DEFAULT.einsum("BLD,DF->BLF", placed, weight)
        taken = DEFAULT.take_rows(weight, jnp.zeros((2, 3), jnp.int32), "BLF")
        for made in (placed, product, taken, DEFAULT.reshape(product, (2, 3, 2, 3), "BLH.")):
            assert jax.typeof(made).sharding.spec[:2] == (BATCH_AXES, None)
        np.testing.assert_allclose(product, jnp.einsum("BLD,DF->BLF", x, weight), rtol=1e-5)


def test_each_device_draws_its_part_of_the_same_numbers(mesh_of):
    def draw(key):
        return DEFAULT.draw(jax.random.uniform, key, (8, 4, 16), "GSD")

    key, plain = jax.random.key(3), draw(jax.random.key(3))
    with jax.set_mesh(mesh_of(fsdp=4, expert=2)):
        program = jax.jit(draw).lower(key).compile()
        np.testing.assert_array_equal(program(key), plain)
    assert "[1,4,16]" in program.as_text() and "[8,4,16]" not in program.as_text()


def test_what_leads_as_another_array_keeps_its_other_cuts(mesh_of):
    with jax.set_mesh(mesh_of(fsdp=4, expert=2)):
        like = jax.sharding.reshard(jnp.zeros((2, 8, 4)), P("expert", "fsdp"))
        x = jax.sharding.reshard(jnp.arange(16.0).reshape(2, 8), P(None, "fsdp"))
        assert jax.typeof(lead_like(x, like, 1)).sharding.spec == P("expert", "fsdp")
        assert jax.typeof(lead_like(x, like, 0)).sharding.spec == P(None, "fsdp")
        taken = jax.sharding.reshard(jnp.zeros((2, 8)), P(None, "expert"))
        assert jax.typeof(lead_like(taken, like, 1)).sharding.spec == P("expert", None)
