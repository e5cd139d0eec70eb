# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What experts do
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-lm/sparse_lm/blob/main/colab/specialisation.ipynb)
#
# Trains experts on a language of known domains, and looks whether they have found them: what an expert is chosen for,
# and what is lost without it.

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
import sys
from pathlib import Path

from absl import logging

from sparse_lm.analysis.page import write_analysis
from sparse_lm.analysis.run import Options, analyze
from sparse_lm.data.config import DataConfig, GrammarConfig
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.optim.config import OptimConfig
from sparse_lm.telemetry.inline import inline_page
from sparse_lm.train.config import CheckpointConfig, TrainConfig
from sparse_lm.train.session import train

RUN = Path("runs/specialisation")
logging.set_verbosity(logging.ERROR)  # checkpoints that are only read make warnings of no interest

# %% [markdown]
# Three domains over the same 16 symbols: a document stays in one, and which symbols may follow another depends on the
# domain. Four experts, of which each token has one. Earlier checkpoints are kept, to see when the routers settle.

# %%
grammar = GrammarConfig(num_domains=3, num_symbols=16, branching=2, document_length=64, num_documents=2048)
moe = MoEConfig(num_experts=4, top_k=1, d_expert=32, every=1, capacity_factor=None, capacity_factor_eval=None)
experiment = Experiment(
    model=ModelConfig(num_layers=2, d_model=32, num_heads=4, d_ff=32, moe=moe),
    data=DataConfig(source="grammar", length=64, validation_fraction=0.1, grammar=grammar),
    optim=OptimConfig(learning_rate=5e-3, warmup_steps=20),
    train=TrainConfig(steps=300, batch_size=16, eval_every=100),
    checkpoint=CheckpointConfig(every=60, keep=5),
)
session = train(experiment, RUN, sys.stdout)

# %% [markdown]
# ## Look inside
#
# Held-out text goes through the model, and every decision is recorded. Then each expert is removed in turn, and in turn
# forced on all tokens, with all other decisions kept.

# %%
found = analyze(RUN, Options(batches=16, effect_batches=8))

# %% [markdown]
# How much do a token's experts tell about it? In bits, beside what shuffled labels give: an estimate from counts is
# never quite zero, and only what is above the shuffled one says something.

# %%
for kind in found.feed_forward.specialisation:
    for layer, x in enumerate(kind.information, start=1):
        print(f"{kind.kind:12} layer {layer}: {x.bits:.3f} bits of {x.entropy:.3f}, shuffled at most {x.highest:.3f}")

# %% [markdown]
# ## The page
#
# Maps of experts by symbol, by domain and by position; when the routers settled; and at the end what happens to the
# loss of each domain without an expert. How it is measured, and how far to trust it:
# [docs/analysis.md](https://github.com/sparse-lm/sparse_lm/blob/main/docs/analysis.md).

# %%
inline_page(write_analysis(found), height=1200)
