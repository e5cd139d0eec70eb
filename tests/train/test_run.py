"""The directory of a run: what config.json says, and which second start is the same run."""

from __future__ import annotations

import dataclasses
import json
import platform

import jax
import pytest
import tiny

from sparse_lm.config import ConfigError, from_dict, to_dict
from sparse_lm.data.loader import build_dataset
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.train import run
from sparse_lm.train.run import RESUMABLE, RunInfo, check_resumable, describe_run, read_info, write_info

CONFIG = resolved(tiny.experiment(model__moe__dispatcher="all_to_all"), 8)
STORED = RunInfo(CONFIG, "a" * 64)

ALLOWED = {
    "data__path": None,  # nothing else goes with the grammar; see the test of a moved text
    "train__steps": 500,
    "train__log_every": 7,
    "train__eval_every": 3,
    "train__eval_batches": 1,
    "train__max_nonfinite": 2,
    "train__sample_tokens": 0,
    "train__accumulate": 2,
    "train__pipeline_microbatches": 1,
    "checkpoint__every": 1,
    "checkpoint__keep": 9,
    "checkpoint__best": False,
    "checkpoint__asynchronous": False,
    "mesh__expert": 4,
    "mesh__data": 2,
    "sharding__strategy": "zero1_ep",
    "model__remat": "full",
    "model__scan_layers": False,
    "model__loss_chunk": 16,
    "model__moe__dispatcher": "gather",
    "model__moe__exchange_chunks": 2,
}
REFUSED = {
    "seed": 1,
    "data_seed": 5,
    "train__batch_size": 16,
    "optim__learning_rate": 0.5,
    "optim__name": "lion",
    "model__d_model": 32,
    "model__moe__num_experts": 8,
    "model__moe__capacity_factor": None,
    "model__moe__router__jitter": 0.1,
    "model__moe": None,
    "data__length": 8,
    "data__grammar__seed": 4,
}


def dotted(name: str) -> str:
    return name.replace("__", ".")


@pytest.mark.parametrize("name", ALLOWED)
def test_what_changes_neither_model_nor_data_may_change(name):
    check_resumable(STORED, CONFIG.replace(**{name: ALLOWED[name]}), STORED.fingerprint)


@pytest.mark.parametrize("change", [{"model__moe__hot_copies": 1}, {"model__moe__exchange_room": 1.25}])
def test_how_ragged_rows_are_exchanged_may_change(change):
    ragged = CONFIG.replace(
        model__moe__dispatcher="ragged_all_to_all",
        model__moe__capacity_factor=None,
        model__moe__capacity_factor_eval=None,
    )
    check_resumable(RunInfo(ragged, "a" * 64), ragged.replace(**change), "a" * 64)


def test_every_exception_has_a_case():
    names = [*(dotted(name) for name in ALLOWED), "model.moe.hot_copies", "model.moe.exchange_room"]
    assert all(any(name == key or name.startswith(key + ".") for name in names) for key in RESUMABLE)
    assert all(any(name == key or name.startswith(key + ".") for key in RESUMABLE) for name in names)


@pytest.mark.parametrize("name", REFUSED)
def test_another_model_or_other_data_are_another_run(name):
    with pytest.raises(ConfigError, match="choose another --workdir") as caught:
        check_resumable(STORED, CONFIG.replace(**{name: REFUSED[name]}), STORED.fingerprint)
    assert caught.value.key == dotted(name) or caught.value.key.startswith(dotted(name) + ".")
    if name != "model__moe":
        before = to_dict(CONFIG)
        for part in dotted(name).split("."):
            before = before[part]
        assert f"has {before!r}" in caught.value.why and caught.value.value == REFUSED[name]


def test_changed_data_are_another_run():
    with pytest.raises(ConfigError, match=r"data\.source.*have changed.*aaaaaaaaaaaa, now bbbbbbbbbbbb"):
        check_resumable(STORED, CONFIG, "b" * 64)


def test_a_moved_text_is_the_same_run():
    text = CONFIG.replace(data=CONFIG.data.replace(source="text", path="/here"))
    moved = text.replace(data=text.data.replace(path="/there"))
    check_resumable(RunInfo(text, "a" * 64), moved, "a" * 64)


def test_config_json_says_what_was_run_with_what(tmp_path):
    dataset = build_dataset(CONFIG.data, CONFIG.seed)
    write_info(tmp_path / "new" / "run", describe_run(CONFIG, dataset, {"total": 12, "active": 10}))
    info = json.loads((tmp_path / "new" / "run" / "config.json").read_text())
    assert from_dict(Experiment, info["config"]) == CONFIG
    assert info["versions"]["python"] == platform.python_version()
    assert info["versions"]["jax"] == jax.__version__
    assert all(info["versions"][name] for name in run.PACKAGES)
    assert info["device"] == {"platform": "cpu", "kind": jax.devices()[0].device_kind, "count": jax.device_count()}
    assert info["host"]["cpu"] and info["host"]["cores"] >= 1
    assert info["data"]["fingerprint"] == dataset.fingerprint
    assert info["data"]["domains"] == list(dataset.domains)
    assert info["data"]["entropy"] == pytest.approx(dataset.entropy)
    assert info["data"]["report"] == dataset.report.lines()
    assert info["parameters"] == {"total": 12, "active": 10}
    assert info["git"] is None or len(info["git"].removesuffix("-dirty")) == 40
    assert read_info(tmp_path / "new" / "run") == RunInfo(CONFIG, dataset.fingerprint)


def test_a_checkout_is_not_needed(monkeypatch):
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError("git")))
    assert run._commit() is None


def test_a_directory_without_a_run(tmp_path):
    assert read_info(tmp_path) is None
    assert read_info(tmp_path / "absent") is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": {"nonsense": 1}, "data": {"fingerprint": "a"}}'])
def test_an_unreadable_configuration_is_one_error(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is not a configuration") as caught:
        read_info(tmp_path)
    assert caught.value.key == "workdir"


def test_a_directory_that_cannot_be_written_is_one_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for workdir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="choose another directory"):
            write_info(workdir, {})


def test_describing_is_pure():
    dataset = dataclasses.replace(build_dataset(CONFIG.data, CONFIG.seed), entropy=None)
    assert describe_run(CONFIG, dataset, {})["data"]["entropy"] is None
    assert describe_run(CONFIG, dataset, {}) == describe_run(CONFIG, dataset, {})
