"""Checkpoints: bit-equal on any devices, every damage found, nothing lost when a process dies."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.manifest import FILE, ITEM, CheckpointError, Leaf

EVERY = CheckpointConfig(every=1, keep=100, best=False)


def _tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "up_EDF": jnp.asarray(rng.normal(size=(8, 4, 16)), jnp.float32),
            "out_FD": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16),
        },
        "opt_state": (jnp.asarray(seed, jnp.int32), [None, jnp.asarray(rng.normal(size=(3,)), jnp.float32)]),
    }


def _abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def _assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def _save(directory, steps=(1,), config=EVERY, losses=None):
    with Checkpoints(directory, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, _tree(step), {"step": step}, loss=(losses or {}).get(step))
    return directory


def _refused(kind, match, action, *args, **kwargs):
    with pytest.raises(CheckpointError, match=match) as caught:
        action(*args, **kwargs)
    assert caught.value.kind == kind
    return caught.value


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Step 1; for looking at only."""
    return _save(tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved, tmp_path):
    """Step 1 in a directory of its own."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip(tmp_path, asynchronous):
    config = CheckpointConfig(every=1, asynchronous=asynchronous)
    with Checkpoints(tmp_path / "new" / "run", config) as checkpoints:
        assert checkpoints.latest_step() is None and checkpoints.steps() == ()
        assert checkpoints.save(3, _tree(3), {"data": {"next": [1, 2.5, None, "x"]}}) is True
        tree, extra = checkpoints.restore(_abstract(_tree()))
        _assert_same(tree, _tree(3))
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
    tree, extra = Checkpoints(saved, EVERY, read_only=True).restore(_on(eight, _tree()))
    assert len(tree["params"]["up_EDF"].sharding.device_set) == 8
    assert tree["params"]["up_EDF"].sharding.spec == PartitionSpec("expert", "fsdp")
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        checkpoints.save(2, tree, extra)
        again, _ = checkpoints.restore(_on(two, _tree()))
    assert len(again["params"]["up_EDF"].sharding.device_set) == 2
    _assert_same(again, _tree(1))


def test_shapes_traced_under_a_mesh_are_restored_onto_it(saved, mesh_of):
    with jax.set_mesh(mesh_of(fsdp=2)):
        abstract = jax.eval_shape(lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _tree()))
        spec = PartitionSpec(None, "fsdp")
        shape = jax.eval_shape(lambda x: jax.sharding.reshard(x, spec), abstract["params"]["up_EDF"])
        abstract["params"]["up_EDF"] = shape
        tree, _ = Checkpoints(saved, EVERY, read_only=True).restore(abstract)
    assert len(tree["params"]["up_EDF"].sharding.device_set) == 2
    _assert_same(tree, _tree(1))


def test_arrays_may_be_donated_while_they_are_written(tmp_path):
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = {"x": jnp.zeros((1 << 20,), jnp.float32)}
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        for step in range(4):
            checkpoints.save(step, tree, {})
            tree = bump(bump(tree))
        for step in range(4):
            got, _ = checkpoints.restore(_abstract(tree), step)
            np.testing.assert_array_equal(got["x"], np.full(1 << 20, 2 * step, np.float32))


def test_saves_at_multiples_of_every_and_when_forced(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(every=10, keep=100)) as checkpoints:
        done = [checkpoints.save(step, _tree(), {}) for step in (5, 10, 15, 20)]
        assert done == [False, True, False, True]
        assert checkpoints.save(23, _tree(), {}, force=True) is True
        assert checkpoints.save(23, _tree(), {}, force=True) is False  # the last step of a training, asked for twice
        checkpoints.wait()
        assert checkpoints.steps() == (10, 20, 23)


def test_keeps_the_newest_and_the_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 6: 1.5}
    config = CheckpointConfig(every=1, keep=2)
    _save(tmp_path, (1, 2, 3, 4, 5, 6), config, losses)
    with Checkpoints(tmp_path, config) as checkpoints:
        assert checkpoints.steps() == (2, 5, 6) and checkpoints.best_step() == 2
        checkpoints.save(7, _tree(7), {}, loss=0.5)  # a new best, known to a process that did not save the old one
        checkpoints.wait()
        assert checkpoints.steps() == (6, 7) and checkpoints.best_step() == 7


def test_keeps_the_newest_alone(tmp_path):
    config = CheckpointConfig(every=1, keep=2, best=False)
    _save(tmp_path, (1, 2, 3, 4), config, {1: 0.1})
    assert Checkpoints(tmp_path, config, read_only=True).steps() == (3, 4)
    assert Checkpoints(tmp_path, config, read_only=True).best_step() is None


def test_two_checkpoints_of_one_directory_do_not_mix_runs(run):
    with Checkpoints(run, EVERY) as checkpoints:
        for step in (0, 1):
            error = _refused("exists", "step 1 is there.*continue from 1", checkpoints.save, step, _tree(), {})
            assert error.step == step
        checkpoints.save(2, _tree(2), {})
        _assert_same(checkpoints.restore(_abstract(_tree()))[0], _tree(2))


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
        _refused("unsupported leaf", match, checkpoints.save, 1, tree, {})
        assert checkpoints.save(1, _tree(), {}) is True


def test_extra_that_is_not_json_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        _refused("write", "extra is not JSON.*complex", checkpoints.save, 1, _tree(), {"a": 1j})


def _changed(**changes):
    tree = _tree()
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
    error = _refused(kind, match, checkpoints.restore, _abstract(tree), allow_older=True)
    assert error.step == 1 and error.path == str(saved / "1")


def test_part_of_a_checkpoint(saved):
    checkpoints = Checkpoints(saved, EVERY, read_only=True)
    wanted = {"params": _abstract(_tree()["params"])}
    _refused("extra leaf", "stores 'opt_state/0'", checkpoints.restore, wanted)
    tree, _ = checkpoints.restore(wanted, ignore=("opt_state/",))
    _assert_same(tree, {"params": _tree(1)["params"]})


def test_no_checkpoint_is_an_error(tmp_path, saved):
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        for action in (lambda: checkpoints.restore(_abstract(_tree())), checkpoints.read_extra, checkpoints.leaves):
            _refused("absent", "there is no committed step", action)
    checkpoints = Checkpoints(saved, EVERY, read_only=True)
    _refused("absent", r"\(step 9\): no such step; there are \[1\]", checkpoints.restore, _abstract(_tree()), 9)


def _covered(run):
    manifest = json.loads((run / "1" / ITEM / FILE).read_text())
    return [run / "1" / file["path"] for file in manifest["files"] if file["bytes"]]


def test_forty_flipped_bits_are_all_found(run):
    checkpoints = Checkpoints(run, EVERY, read_only=True)
    files = _covered(run)
    data = [file for file in files if file.parent.name == "d" and file.parent.parent.name == "state"]
    assert data
    rng = np.random.default_rng(0)
    for trial in range(40):
        victims = data if trial % 2 else files
        file = victims[rng.integers(len(victims))]
        content = file.read_bytes()
        changed = bytearray(content)
        changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        file.write_bytes(changed)
        _refused("corrupt", "changed since it was saved", checkpoints.restore, _abstract(_tree()))
        file.write_bytes(content)
    _assert_same(checkpoints.restore(_abstract(_tree()))[0], _tree(1))


def test_each_deleted_or_truncated_file_is_found(run):
    checkpoints = Checkpoints(run, EVERY, read_only=True)
    for file in [*_covered(run), run / "1" / ITEM / FILE]:
        content = file.read_bytes()
        file.unlink()
        error = _refused("corrupt", "is missing", checkpoints.restore, _abstract(_tree()))
        assert error.step == 1 and error.path == str(run / "1")
        for size in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:size])
            _refused("corrupt", "bytes and was saved|damaged", checkpoints.restore, _abstract(_tree()))
        file.write_bytes(content)


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda file: file.write_bytes(b"\0")])
def test_bookkeeping_of_the_storage_library_is_not_needed(run, damage):
    files = [file for file in (run / "1").iterdir() if file.is_file()]
    assert files
    for file in files:
        damage(file)
    _assert_same(Checkpoints(run, EVERY, read_only=True).restore(_abstract(_tree()))[0], _tree(1))


def _damage(directory, step):
    (directory / str(step) / "state" / "_METADATA").write_bytes(b"{}")


def test_never_falls_back_unless_asked(tmp_path):
    _save(tmp_path, (1, 2, 3))
    _damage(tmp_path, 3)
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        _refused("corrupt", r"\(step 3\).*allow_older=True", checkpoints.restore, _abstract(_tree()))
        _refused("corrupt", r"\(step 3\)", checkpoints.restore, _abstract(_tree()), 3)
        assert checkpoints.steps() == (1, 2, 3)
        tree, extra = checkpoints.restore(_abstract(_tree()), allow_older=True)
        assert extra == {"step": 2} and (tmp_path / "damaged-3").is_dir()
        _assert_same(tree, _tree(2))
        assert checkpoints.save(3, _tree(33), {}) is True  # training goes on and comes to step 3 again
        _assert_same(checkpoints.restore(_abstract(_tree()))[0], _tree(33))
        assert checkpoints.steps() == (1, 2, 3)


def test_looking_for_an_older_step_read_only_changes_nothing(tmp_path):
    _save(tmp_path, (1, 2))
    _damage(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path, EVERY, read_only=True)
    assert checkpoints.restore(_abstract(_tree()), allow_older=True)[1] == {"step": 1}
    assert checkpoints.steps() == (1, 2)


def test_all_steps_damaged(tmp_path):
    _save(tmp_path, (1, 2))
    _damage(tmp_path, 1)
    _damage(tmp_path, 2)
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        restore = checkpoints.restore
        _refused(
            "corrupt", r"no step is intact:.*\(step 2\).*\(step 1\)", restore, _abstract(_tree()), allow_older=True
        )
        assert checkpoints.steps() == (1, 2)


def test_a_torn_save_is_ignored_and_cleaned_away(run):
    torn = run / "2.orbax-checkpoint-tmp"
    shutil.copytree(run / "1", torn)
    reader = Checkpoints(run, EVERY, read_only=True)
    assert reader.steps() == (1,) and torn.is_dir()  # it may be another process at work
    with Checkpoints(run, EVERY) as checkpoints:
        assert checkpoints.steps() == (1,)
        checkpoints.save(2, _tree(2), {})
        assert checkpoints.restore(_abstract(_tree()))[1] == {}
        assert checkpoints.steps() == (1, 2)
    assert not torn.exists()


def test_unwritable_directory_fails_at_construction(tmp_path):
    (tmp_path / "file").write_text("")
    _refused("unreadable", "cannot be written.*choose another", Checkpoints, tmp_path / "file" / "run", EVERY)


def test_reading_where_nothing_is(tmp_path):
    _refused("unreadable", "no such directory", Checkpoints, tmp_path / "none", EVERY, read_only=True)
    assert not (tmp_path / "none").exists()


def test_read_only_does_not_write(saved):
    _refused("write", "read_only=True", Checkpoints(saved, EVERY, read_only=True).save, 5, _tree(), {})


@pytest.mark.parametrize("surface", ["raise_errors", "save", "wait", "close"])
def test_a_full_disk_is_told_at_the_next_call_and_older_steps_stay(run, surface):
    checkpoints = Checkpoints(run, EVERY)
    big = {"x": jnp.asarray(np.random.default_rng(0).normal(size=1 << 18), jnp.float32)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        checkpoints.save(2, big, {})
        deadline = time.monotonic() + 30
        while checkpoints._manager.is_saving_in_progress() and time.monotonic() < deadline:
            time.sleep(0.01)
        call = {"save": lambda: checkpoints.save(3, big, {})}.get(surface, lambda: getattr(checkpoints, surface)())
        error = _refused("write", r"\(step 2\): saving failed.*earlier steps are intact", call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.step == 2
    if surface != "close":
        assert checkpoints.steps() == (1,)
        assert checkpoints.save(2, _tree(2), {}) is True  # room again
        checkpoints.close()
    with Checkpoints(run, EVERY) as again:
        _assert_same(again.restore(_abstract(_tree()), 1)[0], _tree(1))
        assert again.steps() == ((1,) if surface == "close" else (1, 2))


WRITER = """
import sys, numpy as np
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig(every=1, keep=2))
for step in range(1, 10_000):
    tree = {f"x{i}": np.full(50_000, step * 100 + i, np.float32) for i in range(8)}
    checkpoints.save(step, tree, {"step": step}, loss=1.0 / step)
    print(step, flush=True)
"""


def test_sigkill_while_saving_leaves_a_restorable_directory(tmp_path):
    wanted = {f"x{i}": jax.ShapeDtypeStruct((50_000,), np.float32) for i in range(8)}
    rng = np.random.default_rng(0)
    for trial in range(3):
        directory = tmp_path / str(trial)
        arguments = [sys.executable, "-c", WRITER, str(directory)]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as writer:
            assert writer.stdout is not None
            for _ in range(3 + trial):
                started = int(writer.stdout.readline())
            time.sleep(rng.uniform(0, 0.05))
            writer.send_signal(signal.SIGKILL)
            rest = writer.stdout.read().split()
        started = max([started, *map(int, rest)])
        with Checkpoints(directory, CheckpointConfig(every=1, keep=2)) as checkpoints:
            tree, extra = checkpoints.restore(wanted)
            # A save waits for the one before: all but the last one or two that were started are committed.
            assert started - 1 <= extra["step"] <= started + 1
            for i in range(8):
                np.testing.assert_array_equal(tree[f"x{i}"], np.full(50_000, extra["step"] * 100 + i, np.float32))
            assert checkpoints.save(extra["step"] + 1, tree, {}) is True
        assert not list(directory.glob("*tmp*"))
