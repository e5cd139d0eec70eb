"""Checkpoints under fire: every damage is found, and nothing is lost when a process dies or a disk is full."""

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
from checkpoint_cases import EVERY, abstract, assert_same, refused, save, tree_of

from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.manifest import FILE, ITEM


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Step 1; for looking at only."""
    return save(tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def run(saved, tmp_path):
    """Step 1 in a directory of its own."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


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
        refused("corrupt", "changed since it was saved", checkpoints.restore, abstract(tree_of()))
        file.write_bytes(content)
    assert_same(checkpoints.restore(abstract(tree_of()))[0], tree_of(1))


def test_each_deleted_or_truncated_file_is_found(run):
    checkpoints = Checkpoints(run, EVERY, read_only=True)
    for file in [*_covered(run), run / "1" / ITEM / FILE]:
        content = file.read_bytes()
        file.unlink()
        error = refused("corrupt", "is missing", checkpoints.restore, abstract(tree_of()))
        assert error.step == 1 and error.path == str(run / "1")
        for size in (0, len(content) // 2, len(content) - 1):
            file.write_bytes(content[:size])
            refused("corrupt", "bytes and was saved|damaged", checkpoints.restore, abstract(tree_of()))
        file.write_bytes(content)


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, lambda file: file.write_bytes(b"\0")])
def test_bookkeeping_of_the_storage_library_is_not_needed(run, damage):
    files = [file for file in (run / "1").iterdir() if file.is_file()]
    assert files
    for file in files:
        damage(file)
    assert_same(Checkpoints(run, EVERY, read_only=True).restore(abstract(tree_of()))[0], tree_of(1))


def _damage(directory, step):
    (directory / str(step) / "state" / "_METADATA").write_bytes(b"{}")


def test_never_falls_back_unless_asked(tmp_path):
    save(tmp_path, (1, 2, 3))
    _damage(tmp_path, 3)
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        refused("corrupt", r"\(step 3\).*allow_older=True", checkpoints.restore, abstract(tree_of()))
        refused("corrupt", r"\(step 3\)", checkpoints.restore, abstract(tree_of()), 3)
        assert checkpoints.steps() == (1, 2, 3)
        tree, extra = checkpoints.restore(abstract(tree_of()), allow_older=True)
        assert extra == {"step": 2} and (tmp_path / "damaged-3").is_dir()
        assert_same(tree, tree_of(2))
        assert checkpoints.save(3, tree_of(33), {}) is True  # training goes on and comes to step 3 again
        assert_same(checkpoints.restore(abstract(tree_of()))[0], tree_of(33))
        assert checkpoints.steps() == (1, 2, 3)


def test_looking_for_an_older_step_read_only_changes_nothing(tmp_path):
    save(tmp_path, (1, 2))
    _damage(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path, EVERY, read_only=True)
    assert checkpoints.restore(abstract(tree_of()), allow_older=True)[1] == {"step": 1}
    assert checkpoints.steps() == (1, 2)


def test_all_steps_damaged(tmp_path):
    save(tmp_path, (1, 2))
    _damage(tmp_path, 1)
    _damage(tmp_path, 2)
    with Checkpoints(tmp_path, EVERY) as checkpoints:
        restore = checkpoints.restore
        refused(
            "corrupt", r"no step is intact:.*\(step 2\).*\(step 1\)", restore, abstract(tree_of()), allow_older=True
        )
        assert checkpoints.steps() == (1, 2)


def test_a_torn_save_is_ignored_and_cleaned_away(run):
    torn = run / "5.orbax-checkpoint-tmp"
    shutil.copytree(run / "1", torn)
    reader = Checkpoints(run, EVERY, read_only=True)
    assert reader.steps() == (1,) and torn.is_dir()  # it may be another process at work
    with Checkpoints(run, EVERY) as checkpoints:
        assert checkpoints.steps() == (1,)
        checkpoints.save(2, tree_of(2), {})
        assert checkpoints.restore(abstract(tree_of()))[1] == {}
        assert checkpoints.steps() == (1, 2)
    assert not torn.exists()


def test_unwritable_directory_fails_at_construction(tmp_path):
    (tmp_path / "file").write_text("")
    refused("unreadable", "cannot be written.*choose another", Checkpoints, tmp_path / "file" / "run", EVERY)


def test_reading_where_nothing_is(tmp_path):
    refused("unreadable", "no such directory", Checkpoints, tmp_path / "none", EVERY, read_only=True)
    assert not (tmp_path / "none").exists()


def test_read_only_does_not_write(saved):
    refused("write", "read_only=True", Checkpoints(saved, EVERY, read_only=True).save, 5, tree_of(), {})


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
        error = refused("write", r"\(step 2\): saving failed.*earlier steps are intact", call)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.step == 2
    if surface != "close":
        assert checkpoints.steps() == (1,)
        assert checkpoints.save(2, tree_of(2), {}) is True  # room again
        checkpoints.close()
    with Checkpoints(run, EVERY) as again:
        assert_same(again.restore(abstract(tree_of()), 1)[0], tree_of(1))
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
