"""experiments/generate.py as a user runs it."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from sparse_lm.config import to_dict
from sparse_lm.data.config import DataConfig, FactsConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import build_decoder
from sparse_lm.sharding import DEFAULT
from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig

MAIN = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "generate.py"


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    experiment = Experiment(
        model=ModelConfig(vocab_size=11, num_layers=1, d_model=8, num_heads=2, d_ff=8),
        data=DataConfig(source="facts", length=6, facts=FactsConfig(num_a=3, num_b=3, num_values=4)),
        checkpoint=CheckpointConfig(asynchronous=False),
    )
    (workdir / "config.json").write_text(json.dumps({"config": to_dict(experiment), "data": {"fingerprint": "0"}}))
    with Checkpoints(workdir / "checkpoints", experiment.checkpoint) as checkpoints:
        checkpoints.save(5, {"model": build_decoder(jax.random.key(0), experiment.model, DEFAULT)}, {}, force=True)
    return workdir


def call(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(MAIN), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_prompt_and_continuation_on_stdout(workdir):
    arguments = [f"--workdir={workdir}", "--prompt=| a1 b2", "--max_new_tokens=4", "--temperature=0.9", "--top_k=6"]
    done = call(*arguments, "--seed=3")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert done.stdout == " ".join(words) + "\n"
    assert words[:3] == ["|", "a1", "b2"] and len(words) == 7
    assert call(*arguments, "--seed=3", "--step=5").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "temperature=-1.0"),
        (["--prompt="], "is empty"),
    ],
)
def test_an_error_is_one_line_and_status_2(workdir, arguments, message):
    failed = call(f"--workdir={workdir}", *arguments)
    assert failed.returncode == 2 and failed.stdout == ""
    assert message in failed.stderr and len(failed.stderr.splitlines()) == 1


def test_without_a_run(tmp_path):
    failed = call(f"--workdir={tmp_path}", "--prompt=x")
    assert failed.returncode == 2
    assert "there is no config.json" in failed.stderr and "Traceback" not in failed.stderr
