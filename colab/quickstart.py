# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Sparse against dense, in two minutes
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-lm/sparse_lm/blob/main/colab/quickstart.ipynb)
#
# Trains a small language model with sparse experts, and its dense twin: the same data, steps and FLOPs per token. Then
# compares them, and lets the sparse one write.

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

from sparse_lm.data.config import DataConfig
from sparse_lm.experiment import Experiment
from sparse_lm.generate.complete import complete
from sparse_lm.generate.sample import Sampling
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.counts import dense_twin
from sparse_lm.moe.config import MoEConfig
from sparse_lm.moe.routers.top_k import TopK
from sparse_lm.optim.config import OptimConfig
from sparse_lm.telemetry.compare import compare_losses
from sparse_lm.telemetry.inline import inline_figures, inline_page
from sparse_lm.telemetry.rundata import load_run
from sparse_lm.train.config import CheckpointConfig, TrainConfig
from sparse_lm.train.restore import load_model
from sparse_lm.train.session import train

RUNS = Path("runs/quickstart")
logging.set_verbosity(logging.ERROR)  # checkpoints that are only read make warnings of no interest

# %% [markdown]
# An experiment is one frozen value; what is left out has its default, and a value that cannot work is refused here. Its
# data are the sources, documentation and license texts of the Python that runs this, so there is nothing to download.

# %%
moe = MoEConfig(num_experts=16, top_k=2, capacity_factor=2.0, router=TopK(renormalise="before_drop"))
sparse = Experiment(
    model=ModelConfig(num_layers=2, d_model=96, num_heads=4, d_ff=384, activation="gelu", moe=moe),
    data=DataConfig(source="stdlib", length=128, max_bytes=8_000_000),
    optim=OptimConfig(learning_rate=4e-3, warmup_steps=30),
    train=TrainConfig(steps=600, batch_size=8, eval_every=100, eval_batches=16),
    checkpoint=CheckpointConfig(every=600),
)
dense = sparse.replace(model=dense_twin(sparse.model))

# %% [markdown]
# Training goes on where it was stopped: run the cell again, and it resumes or finds itself finished.

# %%
experiments = {"sparse": sparse, "dense": dense}
for name, experiment in experiments.items():
    print(f"\n{name}")
    train(experiment, RUNS / name, sys.stdout)

# %% [markdown]
# ## Which one is better?
#
# At equal FLOPs per token the sparse model has several times the parameters. So few steps on text show little of what
# that is worth; `paper_table.ipynb` repeats such a comparison over seeds, on data where it is worth much.

# %%
inline_figures(compare_losses({name: load_run(RUNS / name) for name in experiments}))

# %% [markdown]
# ## What it writes
#
# After 600 steps, the look of source code and of prose, letter by letter.

# %%
loaded = load_model(RUNS / "sparse")
print("".join(complete(loaded.model, loaded.tokenizer, "The ", max_new_tokens=300, sampling=Sampling(0.7))))

# %% [markdown]
# ## The report of a run
#
# The page that every run writes: losses, the load of every expert over time, drops, the decisions' entropy.

# %%
inline_page(RUNS / "sparse" / "report.html", height=900)
