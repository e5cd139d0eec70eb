"""Checkpoints: bit-equal on any devices, kept by rule, refused when they do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_cases import EVERY, abstract, assert_same, refused, save, tree_of
from jax.sharding import NamedSharding, PartitionSpec

from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.manifest import Leaf


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Step 1; for looking at only."""
    return save(tmp_path_factory.mktemp("saved") / "run")


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip(tmp_path, asynchronous):
    config = CheckpointConfig(every=1, asynchronous=asynchronous)
    with Checkpoints(tmp_path / "new" / "run", config) as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.steps() == ()
        assert checkpoints.save(3, tree_of(3), {"data": {"next": [1, 2.5, None, "x"]}}) is True
        tree, extra = checkpoints.restore(abstract(tree_of()))
        assert_same(tree, tree_of(3))
        assert extra == {"data": {"next": [1, 2.5, None, "x"]}} == checkpoints.read_extra()
        assert checkpoints.steps() == (3,) and checkpoints.latest_step() == 3


def test_reports_what_is_stored(saved):
    leaves = Checkpoints(saved, EVERY, read_only=True).leaves()
    assert leaves == (
        Leaf("opt_state/0", "int32", ()),
        Leaf("opt_state/1/1", "float32", (3,)),
        Leaf("params/out_FD", "bfloat16", (16, 8)),
        Leaf("params/up_EDF", "float32", (8, 4, 16)),
    )


def _on(mesh, tree):
    specs = {"up_EDF": ("expert", "fsdp"), "out_FD": (None, "fsdp")}

    def place(path, leaf):
        spec = specs.get(getattr(path[-1], "key", ""), ())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(place, tree)


def test_one_to_eight_to_two_devices_is_bit_equal(saved, tmp_path, mesh_of):
    eight, two = mesh_of(data=2, fsdp=2, expert=2), mesh_of(expert=2)
    tree, extra = Checkpoints(saved, EVERY, read_only=True).restore(_on(eight, tree_of()))
    assert len(tree["params"]["up_EDF"].sharding.device_set) == 8
    assert tree["params"]["up_EDF"].sharding.spec == PartitionSpec("expert", "fsdp")
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        checkpoints.save(2, tree, extra)
        again, _ = checkpoints.restore(_on(two, tree_of()))
    assert len(again["params"]["up_EDF"].sharding.device_set) == 2
    assert_same(again, tree_of(1))


def test_shapes_traced_under_a_mesh_are_restored_onto_it(saved, mesh_of):
    with jax.set_mesh(mesh_of(fsdp=2)):
        abstract = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree_of()))
        spec = PartitionSpec(None, "fsdp")
        shape = jax.eval_shape(lambda x: jax.sharding.reshard(x, spec), abstract["params"]["up_EDF"])
        abstract["params"]["up_EDF"] = shape
        tree, _ = Checkpoints(saved, EVERY, read_only=True).restore(abstract)
    assert len(tree["params"]["up_EDF"].sharding.device_set) == 2
    assert_same(tree, tree_of(1))


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"x": jnp.zeros((1 << 20,), jnp.float32)}
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        for step in range(4):
            checkpoints.save(step, tree, {})
            tree = bump(bump(tree))
        for step in range(4):
            got, _ = checkpoints.restore(abstract(tree), step)
            np.testing.assert_array_equal(got["x"], np.full(1 << 20, 2 * step, np.float32))


def test_saves_at_multiples_of_every_and_when_forced(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(every=10, keep=100)) as checkpoints:
        done = [checkpoints.save(step, tree_of(), {}) for step in (5, 10, 15, 20)]
        assert done == [False, True, False, True]
        assert checkpoints.save(23, tree_of(), {}, force=True) is True
        assert checkpoints.save(23, tree_of(), {}, force=True) is False  # the last step of a training, asked for twice
        checkpoints.wait()
        assert checkpoints.steps() == (10, 20, 23)


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 6: 1.5}
    config = CheckpointConfig(every=1, keep=2)
    save(tmp_path, (1, 2, 3, 4, 5, 6), config, losses)
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.steps() == (2, 5, 6) and checkpoints.best_step() == 2
        checkpoints.save(7, tree_of(7), {}, loss=0.5)  # a new best, known to a process that did not save the old one
        checkpoints.wait()
        assert checkpoints.steps() == (6, 7) and checkpoints.best_step() == 7


def test_keeps_the_newest_alone(tmp_path):
    config = CheckpointConfig(every=1, keep=2, best=False)
    save(tmp_path, (1, 2, 3, 4), config, {1: 0.1})
    assert Checkpoints(tmp_path, config, read_only=True).steps() == (3, 4)
    assert Checkpoints(tmp_path, config, read_only=True).best_step() is None


def test_a_second_run_in_one_directory_only_goes_on_from_the_newest_step(tmp_path):
    save(tmp_path)
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        for step in (0, 1):
            error = refused("exists", "step 1 is there.*continue from 1", checkpoints.save, step, tree_of(), {})
            assert error.step == step
        checkpoints.save(2, tree_of(2), {})
        assert_same(checkpoints.restore(abstract(tree_of()))[0], tree_of(2))


@pytest.mark.parametrize(
    "tree, match",
    [
        ({"a": 1}, r"leaf 'a' is a int, not an array; put it into `extra`"),
        ({"key": jax.random.key(0)}, r"leaf 'key' is a PRNG key; derive it from a seed"),
        ({"a": {"b": np.zeros(1)}, "a/b": np.zeros(1)}, "two leaves have one path"),
    ],
)
def test_unsupported_leaves_are_refused(tmp_path, tree, match):
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        refused("unsupported leaf", match, checkpoints.save, 1, tree, {})
        assert checkpoints.save(1, tree_of(), {}) is True


def test_extra_that_is_not_json_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        refused("write", "extra is not JSON.*complex", checkpoints.save, 1, tree_of(), {"a": 1j})


def _changed(**changes):
    tree = tree_of()
    for name, leaf in changes.items():
        if leaf is None:
            tree["params"].pop(name)
        else:
            tree["params"][name] = leaf
    return tree


@pytest.mark.parametrize(
    "tree, kind, match",
    [
        (
            _changed(up_EDF=jnp.zeros((16, 4, 16))),
            "shape",
            r"leaf 'params/up_EDF' has shape \(8, 4, 16\) here and \(16, 4, 16\) in the model",
        ),
        (
            _changed(up_EDF=jnp.zeros((8, 4, 16), jnp.bfloat16)),
            "dtype",
            r"leaf 'params/up_EDF' has dtype float32 here and bfloat16 in the model",
        ),
        (_changed(gate_EDF=jnp.zeros((8, 4, 16))), "missing leaf", r"lacks 'params/gate_EDF'"),
        (_changed(up_EDF=None), "extra leaf", r"stores 'params/up_EDF'.*no place"),
        (
            _changed(up_EDF=None, rise_EDF=jnp.zeros((8, 4, 16))),
            "renamed leaf",
            r"has 'params/up_EDF' .* where 'params/rise_EDF'",
        ),
    ],
)
def test_a_tree_that_does_not_fit_is_refused(saved, tree, kind, match):
    checkpoints = Checkpoints(saved, EVERY, read_only=True)
    error = refused(kind, match, checkpoints.restore, abstract(tree), allow_older=True)
    assert error.step == 1 and error.path == str(saved / "1")


def test_part_of_a_checkpoint(saved):
    checkpoints = Checkpoints(saved, EVERY, read_only=True)
    wanted = {"params": abstract(tree_of()["params"])}
    refused("extra leaf", "stores 'opt_state/0'", checkpoints.restore, wanted)
    tree, _ = checkpoints.restore(wanted, ignore=("opt_state/",))
    assert_same(tree, {"params": tree_of(1)["params"]})


def test_no_checkpoint_is_an_error(tmp_path, saved):
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        for action in (lambda: checkpoints.restore(abstract(tree_of())), checkpoints.read_extra, checkpoints.leaves):
            refused("absent", "there is no committed step", action)
    checkpoints = Checkpoints(saved, EVERY, read_only=True)
    refused("absent", r"\(step 9\): no such step; there are \[1\]", checkpoints.restore, abstract(tree_of()), 9)
