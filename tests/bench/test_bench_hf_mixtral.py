"""The script of the other side keeps to the protocol. Stand-ins play torch and transformers, which are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from sparse_lm.bench.against import QUICK, SCRIPT, command_of

TORCH = """
import contextlib, types
float32, bfloat16, __version__ = "float32", "bfloat16", "2.0.1+cpu"
said = []

class Loss(float):
    def backward(self): said.append("backward")
    def detach(self): return self

class Tokens:
    def __init__(self, *shape): self.shape = shape
    def __getitem__(self, key):
        sizes = range(self.shape[1])[key[1]]
        return Tokens(self.shape[0], len(sizes))
    def contiguous(self): return self

class AdamW:
    def __init__(self, parameters, lr, weight_decay, fused): assert list(parameters)
    def zero_grad(self, set_to_none): said.clear()
    def step(self): assert said == ["backward", "clip 1.0"], said

class Autocast(contextlib.nullcontext):
    enabled = False
    def __init__(self, device, dtype, enabled):
        super().__init__()
        assert (device, dtype) == ("cpu", bfloat16)
        Autocast.enabled = enabled

autocast = Autocast
optim = types.SimpleNamespace(AdamW=AdamW)
clip = lambda parameters, most: said.append(f"clip {most}")
nn = types.SimpleNamespace(Module=object, utils=types.SimpleNamespace(clip_grad_norm_=clip))
manual_seed = lambda seed: None
get_num_threads = lambda: 2
randint = lambda most, shape, device: Tokens(*shape)
full = lambda shape, value, dtype, device: dtype
matmul = lambda a, b: {(0, 0): 1.0}
"""
TRANSFORMERS = """
import types, torch
__version__ = "5.6.7"
MixtralConfig = lambda **options: types.SimpleNamespace(**options)

class Model:
    def __init__(self, config, experts): self.config, self.experts, self.steps = config, experts, 0
    def to(self, device):
        assert device == "cpu"
        return self
    def train(self): return self
    def parameters(self): return [types.SimpleNamespace(numel=lambda: 10), types.SimpleNamespace(numel=lambda: 5)]
    def __call__(self, input_ids, labels, shift_labels):
        config = self.config
        assert input_ids.shape == labels.shape == shift_labels.shape == (2, config.max_position_embeddings)
        assert (config.num_local_experts, config.num_experts_per_tok, config.intermediate_size) == (8, 2, 128)
        assert config.output_router_logits and not config.tie_word_embeddings
        self.steps += 1
        precise = 0.5 if torch.Autocast.enabled else 0.0
        return types.SimpleNamespace(loss=torch.Loss(10 - self.steps + precise))

class AutoModelForCausalLM:
    @staticmethod
    def from_config(config, attn_implementation, experts_implementation, dtype):
        assert (attn_implementation, dtype) == ("sdpa", "float32")
        return Model(config, experts_implementation)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    (folder / "torch.py").write_text(TORCH)
    (folder / "transformers.py").write_text(TRANSFORMERS)
    return os.environ | {"PYTHONPATH": str(folder)}


def served(environment, dtype, words):
    command = command_of(sys.executable, QUICK, dtype, "eager")
    done = subprocess.run(command, input=words, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_it_says_who_it_is_and_answers_each_line(environment):
    ready, first, peak, second = served(environment, "float32", "step\npeak\nstep\n")
    assert ready == {"transformers": "5.6.7", "torch": "2.0.1", "parameters": 15, "threads": 2}
    assert (first["loss"], second["loss"]) == (9.0, 8.0)
    assert first["seconds"] > 0
    assert peak.keys() == {"peak"}
    assert peak["peak"] > 0


def test_bfloat16_is_that_of_the_products(environment):
    assert [answer["loss"] for answer in served(environment, "bfloat16", "step\n")[1:]] == [9.5]


def test_it_ends_with_its_input(environment):
    assert len(served(environment, "float32", "")) == 1


def test_sizes_have_to_be_given(environment):
    command = [sys.executable, str(SCRIPT), "--d_model=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2
    assert "--num_layers" in done.stderr
