"""Datasets, the training stream and validation batches: reproducible, resumable, the same for any process count."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_lm.batch import Batch
from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig, FactsConfig, GrammarConfig
from sparse_lm.data.documents import unit_hash
from sparse_lm.data.loader import Dataset, TrainLoader, build_dataset, validation_batches

GRAMMAR = DataConfig(
    source="grammar",
    length=12,
    validation_fraction=0.2,
    grammar=GrammarConfig(num_domains=3, num_symbols=6, branching=2, document_length=20, num_documents=64),
)
FACTS = DataConfig(source="facts", length=12, facts=FactsConfig(num_a=5, num_b=4, num_values=7))


def columns(batch: Batch) -> list[np.ndarray]:
    return [
        np.asarray(array)
        for array in (batch.tokens_BL, batch.segments_BL, batch.positions_BL, batch.targets_BL, batch.domains_BL)
    ]


def digest(batches) -> str:
    hashed = hashlib.sha256()
    for batch in batches:
        for column in columns(batch):
            assert column.dtype == np.int32
            hashed.update(column.tobytes())
    return hashed.hexdigest()


def write_corpus(folder: Path) -> DataConfig:
    for domain in ("prose", "verse"):
        (folder / domain).mkdir(parents=True)
        for i in range(12):
            (folder / domain / f"{i}.txt").write_text(f"{domain} number {i}, " * (i + 3))
    return DataConfig(source="text", path=str(folder), length=16, validation_fraction=0.25)


@pytest.fixture(scope="module")
def text_config(tmp_path_factory) -> DataConfig:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text")


@pytest.fixture(scope="module", params=["text", "grammar", "facts"])
def dataset(request, text_config) -> Dataset:
    return build_dataset({"text": text_config, "grammar": GRAMMAR, "facts": FACTS}[request.param])


def test_stream_is_the_same_on_every_run(dataset):
    whole = [TrainLoader(dataset, 4, seed=3).batch_at(step) for step in range(60)]
    again = TrainLoader(dataset, 4, seed=3)
    assert digest(whole) == digest([next(again) for _ in range(60)])
    assert digest(whole) != digest([TrainLoader(dataset, 4, seed=4).batch_at(step) for step in range(60)])


@pytest.mark.parametrize("shares", [[(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 2), (1, 3)], [(0, 1, 2, 3), (1,)]])
def test_a_process_gets_its_rows_of_the_same_batch(dataset, shares):
    whole, held_out = TrainLoader(dataset, 4, seed=3), validation_batches(dataset, 4, 2)
    for rows in shares:
        part = TrainLoader(dataset, 4, 3, rows=rows)
        assert part.state() == whole.state()
        for step in (0, 7, 31):
            for all_rows, some in zip(columns(whole.batch_at(step)), columns(part.batch_at(step)), strict=True):
                np.testing.assert_array_equal(all_rows[list(rows)], some)
        for batch, some in zip(held_out, validation_batches(dataset, 4, 2, rows), strict=True):
            np.testing.assert_array_equal(batch.tokens_BL[list(rows)], some.tokens_BL)
            np.testing.assert_array_equal(batch.segments_BL[list(rows)], some.segments_BL)


SCRIPT = """
import sys
from sparse_lm.data.config import DataConfig
from sparse_lm.data.loader import TrainLoader, build_dataset
dataset = build_dataset(DataConfig(source="text", path=sys.argv[1], length=16, validation_fraction=0.25))
print(dataset.fingerprint, TrainLoader(dataset, 4, 3).batch_at(7).tokens_BL.tolist())
"""


def test_another_process_with_other_hashes_and_folder_sees_the_same(text_config, tmp_path):
    write_corpus(tmp_path / "copy")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "copy")],
        env={**os.environ, "PYTHONHASHSEED": "77", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    dataset = build_dataset(text_config)
    batch = TrainLoader(dataset, 4, 3).batch_at(7)
    assert result.stdout.strip() == f"{dataset.fingerprint} {columns(batch)[0].tolist()}"


def test_every_epoch_visits_all_rows_in_its_own_order():
    dataset = build_dataset(GRAMMAR)
    size = len(dataset.train)
    rows = {dataset.train[i].tokens_BL.tobytes(): i for i in range(size)}
    assert len(rows) == size
    loader = TrainLoader(dataset, 1, seed=0)
    orders = [[rows[next(loader).tokens_BL[0].tobytes()] for _ in range(size)] for _ in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len({tuple(order) for order in [*orders, list(range(size))]}) == 4


@given(st.integers(0, 40), st.integers(1, 6))
def test_resumed_stream_goes_on_as_if_never_stopped(stop, batch_size):
    dataset = build_dataset(FACTS)
    loader = TrainLoader(dataset, batch_size, seed=1)
    for _ in range(stop):
        next(loader)
    state = json.loads(json.dumps(loader.state()))
    assert state["step"] == stop
    expected = digest([next(loader) for _ in range(3)])
    resumed = TrainLoader(dataset, batch_size, seed=1)
    resumed.restore(state)
    assert digest([next(resumed) for _ in range(3)]) == expected
    started = TrainLoader(dataset, batch_size, seed=1, start_step=stop)
    assert digest([next(started) for _ in range(3)]) == expected


def test_looking_at_a_step_does_not_move_the_stream():
    loader = iter(TrainLoader(build_dataset(GRAMMAR), 4, seed=1))
    first = digest([loader.batch_at(0)])
    loader.batch_at(9)
    assert digest([next(loader)]) == first


def test_state_counts_epochs():
    dataset = build_dataset(GRAMMAR)
    size = len(dataset.train)
    loader = TrainLoader(dataset, 5, seed=2, start_step=size)
    assert loader.state() == {
        "step": size,
        "epoch": 5,
        "seed": 2,
        "batch_size": 5,
        "fingerprint": dataset.fingerprint,
    }


def test_foreign_states_are_refused():
    dataset = build_dataset(GRAMMAR)
    loader = TrainLoader(dataset, 4, seed=1, start_step=2)
    other = build_dataset(GRAMMAR.replace(length=13))
    for key, elsewhere in {
        "seed": TrainLoader(dataset, 4, seed=2),
        "batch_size": TrainLoader(dataset, 8, seed=1),
        "fingerprint": TrainLoader(other, 4, seed=1),
    }.items():
        with pytest.raises(ValueError, match=rf"data state has {key}=.* and this run {key}=.*set {key} back"):
            loader.restore(elsewhere.state())
    with pytest.raises(ValueError, match=r"without 'batch_size' \(it has epoch, fingerprint, seed, step\)"):
        loader.restore({key: value for key, value in loader.state().items() if key != "batch_size"})
    assert loader.state()["step"] == 2


@pytest.mark.parametrize(
    ("batch_size", "fields", "says"),
    [
        (4, {"rows": (3, 4)}, r"rows=\[3, 4\] must be some of the 4 of the batch"),
        (4, {"rows": ()}, r"rows=\[\] must be some"),
        (0, {}, "batch_size=0"),
        (4, {"start_step": -1}, "start_step=-1 must not be negative"),
    ],
)
def test_impossible_loaders_are_refused(batch_size, fields, says):
    with pytest.raises(ValueError, match=says):
        TrainLoader(build_dataset(FACTS), batch_size, 0, **fields)


def test_text_dataset(text_config):
    dataset = build_dataset(text_config)
    assert dataset.domains == ("prose", "verse")
    assert (dataset.vocab_size, dataset.pad, dataset.entropy) == (264, 256, None)
    report = dataset.report
    assert report.documents == 24
    assert report.bytes == sum(report.train_bytes) + sum(report.validation_bytes)
    assert min(report.train_bytes + report.validation_bytes) > 0
    assert (report.train_rows, report.validation_rows) == (len(dataset.train), len(dataset.validation))
    sides = [
        {dataset.tokenizer.decode(side[i].tokens_BL)[:40] for i in range(len(side))}
        for side in (dataset.train, dataset.validation)
    ]
    assert sides[0].isdisjoint(sides[1])


def test_bytes_per_target_by_counting(text_config):
    dataset = build_dataset(text_config)
    tokens, targets = (
        np.concatenate([column(dataset.validation[i]) for i in range(len(dataset.validation))])
        for column in (lambda row: row.tokens_BL, lambda row: row.targets_BL)
    )
    of_bytes = ((tokens < 256) & (targets == 1)).sum()
    assert dataset.validation_bytes_per_target == pytest.approx(of_bytes / targets.sum())
    assert of_bytes < targets.sum()
    held_out = [f"{domain}/{i}.txt" for domain in ("prose", "verse") for i in range(12)]
    held_out = [name for name in held_out if unit_hash(name) < 0.25]
    assert targets.sum() - of_bytes == len(held_out) == 7  # the end of each document; none of them starts a row


def test_seed_orders_training_and_leaves_validation(text_config):
    for config in (text_config, GRAMMAR, FACTS):
        first, second = build_dataset(config, 0), build_dataset(config, 1)
        assert first.fingerprint != second.fingerprint
        assert digest([TrainLoader(first, 4, 0).batch_at(0)]) != digest([TrainLoader(second, 4, 0).batch_at(0)])
        assert digest(validation_batches(first, 4, 3)) == digest(validation_batches(second, 4, 3))


def test_fingerprint_follows_text_and_settings(tmp_path):
    config = write_corpus(tmp_path / "a")
    prints = [build_dataset(config).fingerprint, build_dataset(config.replace(length=17)).fingerprint]
    write_corpus(tmp_path / "b")
    assert build_dataset(config.replace(path=str(tmp_path / "b"))).fingerprint == prints[0]
    for name in ("prose/3.txt", "verse/7.txt"):
        path = tmp_path / "a" / name
        path.write_text("!" + path.read_text()[1:])
        prints.append(build_dataset(config).fingerprint)
    assert len(set(prints)) == 4
    assert all(len(fingerprint) == 64 for fingerprint in prints)


def test_grammar_dataset():
    dataset = build_dataset(GRAMMAR)
    assert (dataset.vocab_size, dataset.domains[0], len(dataset.domains)) == (6, "grammar000", 3)
    assert dataset.validation_bytes_per_target is None
    assert dataset.entropy is not None and dataset.entropy_given_domain is not None
    assert 0 < dataset.entropy_given_domain < math.log(2)
    # Finite rows scatter about the expectation, and not knowing the domain costs at most log 3 a part.
    assert dataset.entropy_given_domain - 0.1 < dataset.entropy < math.log(6)
    assert dataset.tokenizer.decode(dataset.train[0].tokens_BL).split() == [str(i) for i in dataset.train[0].tokens_BL]
    assert max(dataset.train[i].tokens_BL.max() for i in range(len(dataset.train))) < 6


def test_facts_dataset():
    dataset = build_dataset(FACTS)
    assert (dataset.vocab_size, dataset.entropy, dataset.domains) == (17, 0.0, ("facts",))
    assert dataset.report.train_rows is None
    words = dataset.tokenizer.decode(dataset.train[0].tokens_BL).split()
    assert [word[0] for word in words] == ["|", *"abv" * 4]


def test_whole_stdlib_path_builds():
    dataset = build_dataset(DataConfig(max_bytes=400_000, length=64))
    assert dataset.domains == ("code", "docs", "license")
    assert dataset.report.bytes == 400_000
    batch = TrainLoader(dataset, 8, 0).batch_at(0)
    assert batch.tokens_BL.shape == (8, 65)


def test_single_document_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("alone")
    with pytest.raises(ConfigError, match=r"data\.validation_fraction=.*several files"):
        build_dataset(DataConfig(source="text", path=str(tmp_path)))


def test_validation_takes_all_rows_and_fills_the_last_batch(text_config):
    dataset = build_dataset(text_config)
    size = len(dataset.validation)
    assert size % 4
    batches = validation_batches(dataset, 4, 1000)
    assert len(batches) == -(-size // 4)
    assert {batch.tokens_BL.shape for batch in batches} == {(4, 17)}
    tokens = np.concatenate([batch.tokens_BL for batch in batches])
    for i in range(size):
        np.testing.assert_array_equal(tokens[i], dataset.validation[i].tokens_BL)
    assert (tokens[size:] == dataset.pad).all()
    last = batches[-1]
    filled = size % 4
    assert last.segments_BL[:filled].any(axis=1).all()
    assert not last.segments_BL[filled:].any()
    assert not last.targets_BL[filled:].any()


@pytest.mark.parametrize(("batch_size", "num_batches"), [(2, 3), (1, 1), (3, 2)])
def test_validation_is_spread_over_the_rows(batch_size, num_batches):
    dataset = build_dataset(GRAMMAR)
    size, count = len(dataset.validation), batch_size * num_batches
    assert size > 2 * count
    batches = validation_batches(dataset, batch_size, num_batches)
    assert [len(batch.tokens_BL) for batch in batches] == [batch_size] * num_batches
    known = {dataset.validation[i].tokens_BL.tobytes(): i for i in range(size)}
    taken = [known[row.tobytes()] for batch in batches for row in np.asarray(batch.tokens_BL)]
    assert taken == [i * size // count for i in range(count)]
    assert digest(batches) == digest(validation_batches(dataset, batch_size, num_batches))


@pytest.mark.parametrize(("batch_size", "num_batches"), [(0, 3), (3, 0)])
def test_no_validation_is_refused(batch_size, num_batches):
    with pytest.raises(ValueError, match=f"batch_size={batch_size} and num_batches={num_batches}"):
        validation_batches(build_dataset(FACTS), batch_size, num_batches)
