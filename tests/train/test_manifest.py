"""Checksums find every change to the files of a step; leaves are matched with distinct errors."""

import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_lm.train.manifest import (
    FILE,
    ITEM,
    CheckpointError,
    File,
    Leaf,
    match_leaves,
    read_manifest,
    verify_manifest,
    write_manifest,
)

LEAVES = (Leaf("params/up_DF", "float32", (2, 3)), Leaf("step", "int32", ()))


@pytest.fixture
def step(tmp_path):
    directory = tmp_path / "40"
    (directory / "state" / "d").mkdir(parents=True)
    (directory / "extra").mkdir()
    (directory / "state" / "d" / "data").write_bytes(bytes(range(256)) * 9000)  # more than one chunk
    (directory / "state" / "index").write_bytes(b"abc")
    (directory / "extra" / "empty").write_bytes(b"")
    (directory / "_BOOKKEEPING").write_text("rewritten later")
    write_manifest(directory, LEAVES)
    return directory


def _refused(directory, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        verify_manifest(directory)
    assert (caught.value.kind, caught.value.step, caught.value.path) == ("corrupt", 40, str(directory))
    assert "allow_older=True" in str(caught.value)


def test_records_files_and_leaves(step):
    manifest = verify_manifest(step)
    assert manifest.leaves == LEAVES
    # SHA-256 of "abc" is a published test vector (FIPS 180-4), that of nothing as well.
    assert File("state/index", 3, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad") in manifest.files
    assert File("extra/empty", 0, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855") in manifest.files
    assert [file.path for file in manifest.files] == ["extra/empty", "state/d/data", "state/index"]
    assert read_manifest(step) == manifest


def test_leaves_nothing_half_written(step):
    assert [path.name for path in (step / ITEM).iterdir()] == [FILE]


def test_bookkeeping_at_the_top_may_change(step):
    (step / "_BOOKKEEPING").write_text("rewritten")
    (step / "commit").write_text("")
    verify_manifest(step)


def test_a_step_may_be_copied_elsewhere(step):
    moved = step.rename(step.parent / "copy")
    assert verify_manifest(moved).leaves == LEAVES


def test_missing_file(step):
    (step / "state" / "index").unlink()
    _refused(step, r"checkpoint .*/40 \(step 40\): state/index is missing; restore the step from a copy")


def test_unexpected_file(step):
    (step / "state" / "d" / "more").write_bytes(b"")
    _refused(step, "state/d/more is there but was never written by a save; delete it")


@pytest.mark.parametrize("size", [0, 1, 2303999])
def test_truncated_file(step, size):
    data = step / "state" / "d" / "data"
    data.write_bytes(data.read_bytes()[:size])
    _refused(step, rf"state/d/data has {size} bytes and was saved with 2304000")


def test_several_faults_are_counted(step):
    for name in ("state/index", "state/d/data", "extra/empty"):
        (step / name).unlink()
    _refused(step, r"extra/empty is missing \(and 2 more files\)")


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(bit=st.integers(0, 2304000 * 8 - 1))
def test_every_flipped_bit_is_found(step, bit):
    data = step / "state" / "d" / "data"
    content = data.read_bytes()
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << (bit % 8)
    data.write_bytes(changed)
    _refused(step, "state/d/data changed since it was saved")
    data.write_bytes(content)
    verify_manifest(step)


def test_every_change_of_a_character_of_the_manifest_is_found(step):
    path = step / ITEM / FILE
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(0, len(content), 60):
        if content[at : at + 1].isspace():
            continue
        changed = bytearray(content)
        changed[at] ^= 1 << int(rng.integers(0, 7))
        path.write_bytes(changed)
        with pytest.raises(CheckpointError) as caught:
            verify_manifest(step)
        assert caught.value.kind == "corrupt"


@pytest.mark.parametrize("content", ["", "[]", "{", '{"digest": "0"}', "null"])
def test_damaged_manifest(step, content):
    (step / ITEM / FILE).write_text(content)
    _refused(step, f"{ITEM}/{FILE} is damaged")


def test_missing_manifest(step):
    (step / ITEM / FILE).unlink()
    _refused(step, f"{ITEM}/{FILE} is missing")


def test_manifest_of_another_format(step, monkeypatch):
    monkeypatch.setattr("sparse_lm.train.manifest._FORMAT", 7)
    write_manifest(step, LEAVES)
    assert json.loads((step / ITEM / FILE).read_text())["format"] == 7
    monkeypatch.undo()
    _refused(step, "has format 7, this version reads 1")


A, B = Leaf("opt/mu/up_DF", "float32", (2, 3)), Leaf("params/up_DF", "float32", (2, 3))


def test_equal_leaves_match_in_any_order():
    match_leaves("/run/40", [A, B], [B, A])


@pytest.mark.parametrize(
    "wanted, stored, kind, message",
    [
        ([A, B], [A], "missing leaf", r"lacks 'params/up_DF' \(float32\[2, 3\]\); the closest stored name is 'opt/mu"),
        ([A], [Leaf("zzz", "int32", ())], "missing leaf", r"lacks 'opt/mu/up_DF'.*it stores 1 other arrays"),
        ([A], [A, B], "extra leaf", r"stores 'params/up_DF' \(float32\[2, 3\]\) and the model has no place for it"),
        (
            [Leaf("params/in_DF", "float32", (2, 3)), A],
            [B, A],
            "renamed leaf",
            r"has 'params/up_DF' .* where 'params/in_DF' .* is wanted: was it renamed",
        ),
        (
            [A, Leaf(B.path, "float32", (4, 3))],
            [A, B],
            "shape",
            r"leaf 'params/up_DF' has shape \(2, 3\) here and \(4, 3\) in the model",
        ),
        (
            [A, Leaf(B.path, "bfloat16", (2, 3))],
            [A, B],
            "dtype",
            r"leaf 'params/up_DF' has dtype float32 here and bfloat16 in the model; nothing is cast",
        ),
    ],
)
def test_each_mismatch_has_its_own_error(wanted, stored, kind, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        match_leaves("/run/40", wanted, stored)
    assert caught.value.kind == kind and caught.value.step == 40


def test_further_mismatches_are_counted():
    wanted = [Leaf(leaf.path, leaf.dtype, (9, 3)) for leaf in (A, B)]
    with pytest.raises(CheckpointError, match=r"'opt/mu/up_DF' has shape.*\(and 1 more leaves\)"):
        match_leaves("/run/40", wanted, [A, B])


def test_ignored_prefixes_may_be_left_over_and_nothing_else():
    match_leaves("/run/40", [B], [A, B], ignore=("opt/",))
    with pytest.raises(CheckpointError, match="no place for it"):
        match_leaves("/run/40", [B], [A, B], ignore=("opts/",))
    with pytest.raises(CheckpointError, match="lacks"):
        match_leaves("/run/40", [A, B, Leaf("c", "int32", ())], [A, B], ignore=("c",))
