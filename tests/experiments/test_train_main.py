"""The command line of training: what it accepts, and that every mistake is one line."""

from __future__ import annotations

import json

import mains
import overrides  # pyright: ignore[reportMissingImports]  (conftest.py makes it importable)
import pytest
import tiny
from absl import flags

from sparse_lm.config import ConfigError
from sparse_lm.experiment import Experiment


@pytest.fixture
def experiment_of(monkeypatch):
    """The experiment of a command line, in this process."""
    monkeypatch.chdir(mains.ROOT)
    monkeypatch.syspath_prepend(str(mains.ROOT / "tests"))

    def parse(*arguments: str, config: str = mains.CONFIG) -> Experiment:
        monkeypatch.setattr("sys.argv", ["train.py", config, *arguments])
        monkeypatch.setattr(overrides, "_OFF", [])
        monkeypatch.setattr(overrides, "_SET", [])
        holder = overrides.define_config()
        try:
            overrides.parse(list(overrides.sys.argv))
            return overrides.experiment(holder.value)
        finally:
            for name in [name for name in flags.FLAGS if name == "config" or name.startswith("config.")]:
                delattr(flags.FLAGS, name)
            flags.FLAGS.unparse_flags()

    return parse


def test_overrides_reach_every_level(experiment_of):
    made = experiment_of(
        "--config.seed=3",
        "--config.model.moe.num_experts=8",
        "--config.model.moe.router.jitter=0.1",
        "--config.optim.learning_rate=0.25",
        "--config.data_seed=9",
        "--config.model.scan_layers=false",
    )
    base = tiny.experiment(train__steps=60, train__eval_every=20, checkpoint__every=7)
    assert made == base.replace(
        seed=3,
        data_seed=9,
        model__moe__num_experts=8,
        model__moe__router__jitter=0.1,
        optim__learning_rate=0.25,
        model__scan_layers=False,
    )


def test_none_turns_an_option_off_and_a_number_on(experiment_of):
    assert experiment_of("--config.model.moe.capacity_factor=None").model.moe.capacity_factor is None
    assert experiment_of("--config.model.moe=None").model.moe is None
    assert experiment_of("--config.optim.clip=None").optim.clip is None
    assert experiment_of("--config.model.moe.group_size=8").model.moe.group_size == 8


def test_a_variant_of_a_file(experiment_of):
    assert experiment_of(config=mains.CONFIG + ":dense").model.moe is None


REFUSED = {
    "--config.model.moe.num_expert=8": "did you mean 'num_experts'",
    "--config.trian=3": "did you mean 'train'",
    "--config.nosuch=None": "unknown key; known: checkpoint",
    "--config.train.steps.x=None": "config.train.steps.x=None: unknown key",
    "--config.model.moe.num_experts=0": "config.model.moe.num_experts=0: must be at least 1",
    "--config.model.moe.top_k=5": "config.model.moe.top_k=5: must be at most num_experts=4",
    "--config.optim.learning_rate=-1": "config.optim.learning_rate=-1.0: must be greater than 0",
    "--config.optim.learning_rate=nan": "config.optim.learning_rate=nan: expected a finite number",
    "--config.train.steps=None": "config.train.steps=None: expected int",
    "--config.model.num_heads=3": "config.model.num_heads=3: must divide d_model=16",
    "--config.model.position=ropee": "did you mean 'rope'",
    "--config.model.moe.router.kind=gating": "config.model.moe.router.kind='gating': known: ",
    "--config.model.moe.group_size=5": "config.model.moe.group_size=5: must divide data.length=16",
    "--config.train.accumulate=3": "config.train.accumulate=3: must divide train.batch_size=8",
    "--config.data.source=text": "data.source=text needs a path",
}


@pytest.mark.parametrize("argument", REFUSED)
def test_a_mistake_names_key_value_and_way_out(experiment_of, argument):
    with pytest.raises(ConfigError) as caught:
        experiment_of(argument)
    assert REFUSED[argument] in str(caught.value)
    assert "\n" not in str(caught.value)


EXITS = {
    "--config.train.steps=abc": (1, "config.train.steps=abc"),
    "--config.train.steps=2.5": (1, "config.train.steps=2.5"),
    "--config.model=3": (1, "config.model=3"),
    "--nosuch=3": (1, "nosuch"),
    "--config.nosuch.x=3": (2, "error: one of --config.nosuch.x names no option"),
    "--config.train.steps.x=3": (2, "error: one of --config.train.steps.x names no option"),
}


@pytest.mark.parametrize("argument", EXITS)
def test_what_the_flags_cannot_parse_ends_without_a_traceback(experiment_of, argument, capsys):
    with pytest.raises(SystemExit) as caught:
        experiment_of(argument)
    status, words = EXITS[argument]
    assert caught.value.code == status
    assert words in capsys.readouterr().err


def test_an_option_of_what_is_off(experiment_of, capsys):
    with pytest.raises(SystemExit):
        experiment_of("--config.model.moe.top_k=2", config=mains.CONFIG + ":dense")
    assert "--config.model.moe.top_k names no option: Override" in capsys.readouterr().err


@pytest.mark.parametrize(
    "config", ["--config=configs/absent.py", "--config=configs/absent.py:dense", "--config=", "-config=x"]
)
def test_a_missing_file_is_one_line(experiment_of, config, capsys):
    with pytest.raises(SystemExit) as caught:
        experiment_of(config=config)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --config=") and "configs/" in line


def in_one_line(errors: str, words: str) -> None:
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert words in line


def test_usage_without_a_config():
    status, _, errors = mains.call("train")
    assert status == 1 and "--config" in errors and "--workdir" in errors and "Traceback" not in errors


def test_a_stray_argument(tmp_path):
    status, out, errors = mains.call("train", mains.CONFIG, f"--workdir={tmp_path / 'run'}", "extra")
    assert status == 1 and "unexpected arguments: extra" in out + errors and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--devices=8", "--config.mesh.expert=3"], "no whole number for mesh.data on 8 devices"),
        (["--devices=3"], "config.train.batch_size=8: gives microbatches of 8 sequences"),
    ],
)
def test_what_does_not_fit_the_devices_is_one_line_and_writes_nothing(tmp_path, arguments, words):
    status, _, errors = mains.call("train", mains.CONFIG, f"--workdir={tmp_path / 'run'}", *arguments)
    assert status == 2
    in_one_line(errors, words)
    assert not (tmp_path / "run").exists()


def test_virtual_devices_and_a_mesh(tmp_path):
    arguments = ("--devices=8", "--config.mesh.expert=4", "--config.train.steps=3")
    status, out, errors = mains.call("train", mains.CONFIG, f"--workdir={tmp_path}", *arguments)
    assert status == 0, errors
    assert "devices: data=2 x expert=4" in out and "results in" in out
    assert len(tiny.losses(tmp_path)) == 3
    assert json.loads((tmp_path / "config.json").read_text())["device"]["count"] == 8
    status, _, errors = mains.call("train", mains.CONFIG, f"--workdir={tmp_path}", "--config.seed=5")
    assert status == 2
    in_one_line(errors, "config.seed=5: the run in this workdir has 0")
