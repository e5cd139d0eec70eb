# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Plan a pod from a laptop
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/sparse-lm/sparse_lm/blob/main/colab/plan_a_pod.ipynb)
#
# What will a run need, before anyone pays for it? Its train step is compiled for devices that this machine does not
# have, and the compiler is asked for bytes, collectives and FLOPs. Nothing is trained, and no parameter is allocated.

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
import os

import jax
from IPython.display import Markdown

from sparse_lm.experiment import load_experiment
from sparse_lm.planning.advice import advise
from sparse_lm.planning.describe import describe
from sparse_lm.planning.plan import plan_topology, resolve
from sparse_lm.planning.sweep import parse_sweep, sweep, to_markdown, to_svg
from sparse_lm.telemetry.figures import Figure
from sparse_lm.telemetry.inline import inline_figures

# Described devices need no real ones, and the TPU compiler shall not look for any.
jax.config.update("jax_platforms", "cpu")
os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_STDERR_LOG_LEVEL": "3"}

# %% [markdown]
# ## A model of 47 billion parameters on 64 chips
#
# First by formulas, which takes seconds: what a device holds, what it computes, what it sends, and the least time that
# a step can take.

# %%
mixtral = resolve(load_experiment("../configs/paper/mixtral_8x7b.py"))
plan = plan_topology(mixtral, "v5p:4x4x4", compile_step=False)
print(describe(plan, mixtral))

# %% [markdown]
# On chips with less memory it does not fit. What is the nearest change that does?

# %%
small = plan_topology(mixtral, "v5e:8x8", compile_step=False)
print(f"fits: {small.fits}, {small.peak / 1e9:.1f} GB per device")
print(advise(mixtral, small, lambda changed, _: plan_topology(changed, "v5e:8x8", compile_step=False)).text())

# %% [markdown]
# ## Which experts, which mesh, which slice?
#
# Every combination of what is listed is a row; a combination that cannot be is a row that says why.

# %%
axes = parse_sweep("train.batch_size=64,128,256,512 topology=v5p:4x4x4,v5e:8x8")
rows = sweep(mixtral, axes, lambda changed, topology: plan_topology(changed, topology, compile_step=False))
Markdown(to_markdown(rows))

# %%
inline_figures(Figure("Bytes per device", "Estimated, by the rows of a batch.", to_svg(rows)))

# %% [markdown]
# ## Asking the compiler
#
# With the TPU compiler (`pip install libtpu`; no TPU is needed) the step itself is compiled for the slice, and the
# numbers are what the compiler says. Without it the plan stays an estimate and says so. A small model here, since
# compiling takes minutes for a large one.

# %%
quick = resolve(load_experiment("../configs/quickstart.py")).replace(mesh__fsdp=2, mesh__expert=2, mesh__data=1)
print(describe(plan_topology(quick, "v5e:2x2"), quick))
