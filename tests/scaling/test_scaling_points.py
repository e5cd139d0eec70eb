"""Points: from CSVs, runs and studies; whatever is not a measurement is refused with its row and key."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sparse_lm.config import ConfigError, to_dict
from sparse_lm.data.documents import DataError
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import count
from sparse_lm.moe.config import MoEConfig
from sparse_lm.scaling.points import columns_of, drawn, from_rows, read, run_row
from sparse_lm.scaling.published import CHINCHILLA
from sparse_lm.train.config import TrainConfig

MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=16, num_heads=2, d_ff=32, max_length=256)
SPARSE = MODEL.replace(moe=MoEConfig(num_experts=16, top_k=2, d_expert=8))


def experiment(model: ModelConfig = MODEL, steps: int = 10) -> Experiment:
    return Experiment(model=model, train=TrainConfig(steps=steps, batch_size=4))


def write_run(directory, model=MODEL, loss=3.0, steps=10, done=None):
    """A run directory as training leaves it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"config": to_dict(experiment(model, steps))}))
    rows = [{"split": "validation", "step": step, "loss": loss + 1 / step} for step in (1, done or steps)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return loss + 1 / (done or steps)


def test_csv(tmp_path):
    file = tmp_path / "points.csv"
    file.write_text("active,tokens,loss,remark\n1e8,2e9,3.5,small\n1e9,2e10,2.5,large\n")
    points = read(file)
    assert points.count == 2 and points.origin == str(file) and set(points.columns) == {"active", "tokens"}
    assert points.columns["active"].tolist() == [1e8, 1e9] and points.loss.tolist() == [3.5, 2.5]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"active": "-4"}, r"mine\.csv, row 2, active='-4': must be greater than 0, finite"),
        ({"active": "0"}, r"row 2, active='0': must be greater than 0"),
        ({"tokens": "many"}, r"row 2, tokens='many': expected a number"),
        ({"tokens": ""}, r"row 2, tokens='': expected a number"),
        ({"tokens": None}, r"row 2, tokens=None: expected a number"),
        ({"loss": "nan"}, r"row 2, loss='nan': must be greater than 0"),
        ({"loss": "inf"}, r"row 2, loss='inf': must be greater than 0, finite"),
        ({"experts": "0.5"}, r"row 2, experts='0.5': must be at least 1"),
        ({"sparsity": "1"}, r"row 2, sparsity='1': must be at least 0 and less than 1"),
    ],
)
def test_values_that_are_no_measurements_name_row_and_key(row, message):
    good = {"active": "1e8", "tokens": "1e9", "experts": "1", "sparsity": "0", "loss": "3"}
    with pytest.raises(DataError, match=message):
        from_rows([good, good | row], "mine.csv")
    assert from_rows([good], "mine.csv").count == 1


def test_what_is_no_table_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no column 'loss'.*there are active"):
        from_rows([{"active": "1"}], "mine.csv")
    with pytest.raises(DataError, match="no rows"):
        from_rows([], "mine.csv")
    with pytest.raises(DataError, match="there is no such file; give a CSV"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(DataError, match="no finished run in or below it"):
        read(tmp_path)


def test_columns_of_a_run(tmp_path):
    loss = write_run(tmp_path / "dense")
    counts = count(MODEL)
    assert run_row(tmp_path / "dense") == {
        "tokens": 10 * 4 * 256.0,
        "experts": 1.0,
        "granularity": 1.0,
        "sparsity": 0.0,
        "total": counts.total,
        "active": counts.active,
        "total_non_embedding": counts.total - 64 * 16,
        "active_non_embedding": counts.active - 64 * 16,
        "loss": loss,
    }


def test_columns_of_a_sparse_run():
    found = columns_of(experiment(SPARSE))
    # 2 of 16 experts of a quarter of the width: 8 times the parameters that a token uses, 7/8 of them not used.
    assert found == {"tokens": 10240.0, "experts": 8.0, "granularity": 4.0, "sparsity": 0.875}


def test_runs_below_a_directory_leave_out_what_has_not_ended(tmp_path):
    write_run(tmp_path / "a" / "one", loss=2.0)
    write_run(tmp_path / "a" / "two", SPARSE, loss=3.0)
    write_run(tmp_path / "b", done=4)
    points = read(tmp_path)
    assert points.labels == ("a/one", "a/two") and points.loss.tolist() == [2.1, 3.1]
    assert points.columns["experts"].tolist() == [1.0, 8.0]


def test_a_run_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"config": {"modle": {}}}')
    with pytest.raises(DataError, match=r"odd: not a run that this version reads .*modle"):
        read(tmp_path)


def write_results(folder, losses):
    variants = {name: {"measures": {"validation_loss": {"values": seeds}}} for name, seeds in losses.items()}
    (folder / "results.json").write_text(json.dumps({"variants": variants | {"waiting": {"measures": {}}}}))
    return folder / "results.json"


def test_a_study_gives_a_point_for_each_variant_and_seed(tmp_path):
    first = write_run(tmp_path / "runs" / "e8-s0-abc", SPARSE, loss=2.0)
    second = write_run(tmp_path / "runs" / "e8-s1-def", SPARSE, loss=2.5)
    # What an earlier version of the study left behind is no point: its loss is not the one in the results.
    write_run(tmp_path / "runs" / "e8-s0-aaa", MODEL, loss=7.0)
    points = read(write_results(tmp_path, {"e8": {"0": first, "1": second}}))
    assert points.labels == ("e8-s0", "e8-s1") and points.loss.tolist() == [first, second]
    assert points.columns["experts"].tolist() == [8.0, 8.0]


def test_a_study_without_its_runs_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no finished run e8-s0 with loss 2\.0"):
        read(write_results(tmp_path, {"e8": {"0": 2.0}}))
    (tmp_path / "results.json").write_text('{"claims": []}')
    with pytest.raises(DataError, match=r"not the results\.json of a study"):
        read(tmp_path / "results.json")
    with pytest.raises(DataError, match="no rows"):
        read(write_results(tmp_path, {}))


def test_points_of_a_law_have_the_noise_that_was_asked_for():
    columns = {"active": np.geomspace(1e7, 1e10, 4000), "tokens": 1e10}
    exact, noisy = drawn(CHINCHILLA, columns), drawn(CHINCHILLA, columns, noise=0.01, seed=3)
    assert exact.loss == pytest.approx(CHINCHILLA.loss(**columns)) and exact.columns["tokens"].shape == (4000,)
    assert np.std(np.log(noisy.loss / exact.loss)) == pytest.approx(0.01, rel=0.05)
    assert np.array_equal(noisy.loss, drawn(CHINCHILLA, columns, noise=0.01, seed=3).loss)
    with pytest.raises(ConfigError, match="noise"):
        drawn(CHINCHILLA, columns, noise=-1.0)


def test_some_of_the_points():
    points = from_rows([{"active": i, "loss": 10 - i} for i in (1, 2, 3)], "mine", ("a", "b", "c"))
    some = points.take(np.array([2, 0, 2]))
    assert some.labels == ("c", "a", "c") and some.loss.tolist() == [7, 9, 7]
    assert some.columns["active"].tolist() == [3, 1, 3] and some.origin == "mine"
