# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A paper's table, with seeds and verdicts
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-lm/sparse_lm/blob/main/colab/paper_table.ipynb)
#
# Do more experts lower the loss at equal FLOPs per token? Switch Transformer (arXiv 2101.03961) says so in table 7.
# Here is the question again at a size of minutes, with seeds, intervals, and a verdict on each claim.

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

from sparse_lm.study.page import write_page
from sparse_lm.study.plan import make_plan
from sparse_lm.study.results import gather, power_sentence
from sparse_lm.study.runner import Shard, listing, run_study, study_dir
from sparse_lm.study.study import load_study
from sparse_lm.telemetry.inline import inline_page

# %% [markdown]
# A study is a file: question, variants, the paper's numbers, and what the paper claims, as predicates. This one is cut
# down to three of its variants, two seeds and a third of the steps; `experiments/ablate.py` runs it whole.

# %%
study = load_study(Path("../configs/ablations/experts.py")).smaller("e2", "e16", "e32", train__steps=270)
plan = make_plan(study, "toy", seeds=2)
directory = study_dir(plan, Path("runs/studies"))
print("\n".join(listing(plan, directory, Shard())))

# %% [markdown]
# Beside them runs the dense baseline, with the same FLOPs per token. What has finished is never repeated.

# %%
run_study(plan, directory, sys.stdout)

# %%
results = gather(plan, directory)
for judged in results.judged:
    print(f"{judged.verdict:13} {judged.claim.statement}")
print(power_sentence(results))

# %% [markdown]
# ## Beside the paper's numbers
#
# The paper's are of models ten thousand times as large, on text, and in another unit: look at the order and at the
# signs. Two seeds leave wide intervals; "not shown" means exactly that.

# %%
inline_page(write_page(results, directory), height=1200)
