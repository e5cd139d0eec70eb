# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own router, in ten lines
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-lm/sparse_lm/blob/main/colab/router.ipynb)
#
# A router decides which experts see which token. Here is a new one; the package checks it, trains it beside the usual
# one, and none of its layers, losses or dispatchers has to change.

# %%
# Sets up Colab, or another machine without sparse_lm, for the accelerator that it has; elsewhere it does nothing.
import importlib.util
import os
import shutil
import subprocess
import sys

URL, SOURCE = "https://github.com/sparse-lm/sparse_lm", "sparse_lm_source"
if importlib.util.find_spec("sparse_lm") is None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    gpu = subprocess.run(query, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    extra = "[tpu]" if any(name.startswith(("TPU_", "COLAB_TPU")) for name in os.environ) else ""
    if gpu is not None and gpu.returncode == 0:
        # Drivers before 580 run no CUDA 13, and a plugin that is there already is best renewed, not doubled.
        old = importlib.util.find_spec("jax_cuda12_plugin") or int(gpu.stdout.split(".")[0]) < 580
        extra = "[cuda12]" if old else "[cuda]"
    if not os.path.isdir(SOURCE):
        subprocess.run(["git", "clone", "--quiet", "--depth=1", URL, SOURCE], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"./{SOURCE}{extra}"], check=True)
if os.path.isdir(SOURCE):
    os.chdir(f"{SOURCE}/colab")

# %%
import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from sparse_lm.data.config import DataConfig, GrammarConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.check import check_router
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers import ROUTERS, Router, RouterConfig
from sparse_lm.moe.types import Scores, TokenChoice
from sparse_lm.nn.init import fan_in_normal
from sparse_lm.optim.config import OptimConfig
from sparse_lm.telemetry.compare import compare_losses
from sparse_lm.telemetry.inline import inline_figures, inline_page
from sparse_lm.telemetry.rundata import load_run
from sparse_lm.train.config import CheckpointConfig, TrainConfig
from sparse_lm.train.session import train

RUNS = Path("runs/router")

# %% [markdown]
# ## The router
#
# It looks at the angle between a token and the vector of each expert, and not at their lengths (Chi et al. 2022, X-MoE,
# arXiv 2204.09179). The suffix of a name says its axes: `G` groups of `S` tokens, `E` experts, `K` choices, width `D`.
# Padding (`mask_GS` is False) goes to no expert, -1. What a router thought of all experts, `Scores`, is what balance
# losses are made of; it counts nothing itself. The rule, `__call__`, has ten lines.


# %%
@dataclasses.dataclass(frozen=True)
class Cosine(RouterConfig):
    """Its options, and how it is built. Each would be a flag: --config.model.moe.router.temperature=0.2."""

    kind = "cosine"
    temperature: float = 0.2

    def build(self, key, shape, rules):
        return CosineRouter(key, self, shape, rules)


class CosineRouter(Router):
    def __init__(self, key, config, shape, rules):
        self.config, self.shape, self.rules = config, shape, rules
        self.weight_DE = nnx.Param(fan_in_normal(key, (shape.d_model, shape.num_experts), shape.d_model))

    def __call__(self, inputs, key):
        x_GSD = inputs.x_GSD.astype(jnp.float32)
        x_GSD = x_GSD / (jnp.linalg.norm(x_GSD, axis=-1, keepdims=True) + 1e-6)
        weight_DE = self.rules.whole(self.weight_DE[...], jnp.float32)
        weight_DE = weight_DE / (jnp.linalg.norm(weight_DE, axis=0) + 1e-6)
        logits_GSE = self.rules.einsum("GSD,DE->GSE", x_GSD, weight_DE) / self.config.temperature
        gate_GSK, expert_GSK = jax.lax.top_k(jax.nn.softmax(logits_GSE), self.shape.top_k)
        real_GS1 = inputs.mask_GS[..., None]
        decision = TokenChoice(jnp.where(real_GS1, expert_GSK, -1), jnp.where(real_GS1, gate_GSK, 0.0))
        return decision, Scores(jax.nn.softmax(logits_GSE), jax.nn.logsumexp(logits_GSE, axis=-1))


ROUTERS[Cosine.kind] = Cosine

# %% [markdown]
# ## Does it keep its promises?
#
# Does it lose an assignment, or give padding an expert? Do all dispatchers agree? Does it see later tokens, which would
# be cheating in a language model? Does the task reach its weights? A small layer with random tokens answers:

# %%
cosine = MoEConfig(num_experts=8, top_k=2, every=1, router=Cosine())
checks = check_router(cosine)
print(checks)
assert checks.hold

# %% [markdown]
# Leave out `jnp.where(real_GS1, expert_GSK, -1)` above and see.
#
# ## Train it
#
# Four languages that share their symbols, one per document, whose entropy is known: the dashed line is the best that
# any model can do.

# %%
ours = Experiment(
    model=ModelConfig(num_layers=2, d_model=48, num_heads=4, d_ff=64, activation="gelu", moe=cosine),
    data=DataConfig(source="grammar", length=64, grammar=GrammarConfig(num_symbols=16, document_length=65)),
    optim=OptimConfig(learning_rate=5e-3, warmup_steps=20),
    train=TrainConfig(steps=300, batch_size=16, eval_every=50, eval_batches=8),
    checkpoint=CheckpointConfig(every=300),
)
usual = ours.replace(model__moe=MoEConfig(num_experts=8, top_k=2, every=1))

# %%
experiments = {"cosine": ours, "top_k": usual}
for name, experiment in experiments.items():
    print(f"\n{name}")
    train(experiment, RUNS / name, sys.stdout)

# %%
inline_figures(compare_losses({name: load_run(RUNS / name) for name in experiments}))

# %% [markdown]
# One seed says little about which router is better; a study (`paper_table.ipynb`) does that with seeds and intervals.
# The report has what the new router did, without a line written for it: loads, drops, entropy.

# %%
inline_page(RUNS / "cosine" / "report.html", height=900)
