"""The rules of tests/architecture.py hold for the repository, and each of them bites."""

from __future__ import annotations

import pathlib
import textwrap

import architecture
import pytest
from architecture import Source

ROOT = pathlib.Path(__file__).resolve().parent.parent
SOURCES = architecture.load(ROOT)
PATHS = [source.path for source in SOURCES]

# Modules tested under another name, and the test that does it.
COVERED_BY: dict[str, str] = {}


@pytest.mark.parametrize("rule", architecture.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    found = [finding for source in SOURCES for finding in rule(source)]
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


def test_every_folder_is_a_package():
    assert architecture.missing_packages(PATHS) == []


def test_every_module_has_a_test():
    found = architecture.untested(PATHS, COVERED_BY)
    assert not found, "\n".join(found)


def test_there_is_enough_test():
    code, tests = architecture.line_counts(SOURCES)
    least = architecture.MIN_TEST_RATIO * code
    assert tests >= least, f"{tests} lines of test for {code} of code: at least {least:.0f}"


def test_the_rules_see_the_repository():
    assert {"sparse_lm/sharding.py", "tests/architecture.py"} <= set(PATHS)
    assert all("/." not in path and "__pycache__" not in path for path in PATHS)


DOC = '"""Purpose."""\n'
FUNCTION = 'def wide({}):\n    """Purpose."""\n'
IN_NN, IN_MOE = "sparse_lm/nn/norm.py", "sparse_lm/moe/layer.py"

# (rule, path, text, what the only finding says; None where the text is fine)
CASES = [
    ("file_length", IN_NN, "\n" * 350, None),
    ("file_length", IN_NN, "\n" * 351, f"{IN_NN}:1: 351 lines, at most 350"),
    ("file_length", "tests/test_x.py", "\n" * 351, "351 lines, at most 350"),
    ("file_length", "experiments/train.py", "\n" * 80, None),
    ("file_length", "experiments/train.py", "\n" * 81, "81 lines, at most 80"),
    ("function_length", IN_NN, "def long():\n" + "    pass\n" * 69, None),
    ("function_length", IN_NN, "\ndef long():\n" + "    pass\n" * 70, f"{IN_NN}:2: long has 71 lines, at most 70"),
    ("function_length", IN_NN, "class A:\n  async def long(self):\n" + "    pass\n" * 70, "long has 71 lines"),
    ("parameter_count", IN_NN, FUNCTION.format("a, b, c, d, e, f, g, h"), None),
    ("parameter_count", IN_NN, FUNCTION.format("self, a, b, c, d, e, f, g, h"), None),
    ("parameter_count", IN_NN, FUNCTION.format("a, b, c, d, e, f, g, h, i"), "wide takes 9 parameters, at most 8"),
    ("parameter_count", IN_NN, FUNCTION.format("a, /, b, c, *d, e, f, g, h, **i"), "wide takes 9 parameters"),
    ("dependencies", IN_NN, "from sparse_lm.config import Config\nimport sparse_lm.sharding", None),
    ("dependencies", IN_NN, "from sparse_lm import __version__\nfrom sparse_lm.nn.init import normal", None),
    (
        "dependencies",
        IN_NN,
        "import jax\nfrom sparse_lm.moe import layer",
        f"{IN_NN}:2: nn must not import sparse_lm.moe",
    ),
    ("dependencies", IN_NN, "from sparse_lm import moe", "nn must not import sparse_lm.moe"),
    ("dependencies", IN_NN, "import sparse_lm.models.stack as s", "nn must not import sparse_lm.models.stack"),
    ("dependencies", IN_NN, "from ..moe import layer", "nn must not import sparse_lm.moe.layer"),
    ("dependencies", IN_NN, "from .. import train", "nn must not import sparse_lm.train"),
    ("dependencies", "sparse_lm/nn/__init__.py", "from . import norm\nfrom .norm import rms", None),
    ("dependencies", "sparse_lm/nn/__init__.py", "from ..moe import layer", "nn must not import sparse_lm.moe.layer"),
    ("dependencies", IN_NN, "def late():\n    import sparse_lm.moe.slots", "nn must not import sparse_lm.moe.slots"),
    ("dependencies", "sparse_lm/batch.py", "import sparse_lm.dims", None),
    ("dependencies", "sparse_lm/batch.py", "import sparse_lm.nn", "batch must not import sparse_lm.nn"),
    ("dependencies", "sparse_lm/data/loader.py", "from sparse_lm.optim import build", "data must not import"),
    ("dependencies", "sparse_lm/experiment.py", "from sparse_lm.train.config import TrainConfig", None),
    ("dependencies", "sparse_lm/experiment.py", "from sparse_lm.train import loop", "experiment must not import"),
    ("dependencies", "sparse_lm/train/config.py", "import sparse_lm.experiment", "train.config must not import"),
    ("dependencies", "sparse_lm/train/loop.py", "import sparse_lm.train.config, sparse_lm.experiment", None),
    ("dependencies", "sparse_lm/train/loop.py", "from sparse_lm.evals import perplexity", None),
    ("dependencies", "sparse_lm/train/loop.py", "from sparse_lm.generate import beam", "train must not import"),
    ("dependencies", "sparse_lm/evals/choice.py", "import sparse_lm.train.loop", "evals must not import"),
    ("dependencies", "sparse_lm/finetune/lora.py", "import sparse_lm.train.loop", None),
    ("dependencies", "sparse_lm/scaling/fit.py", "import sparse_lm.train.loop", None),
    ("dependencies", "sparse_lm/scaling/fit.py", "import sparse_lm.planning.flops", "scaling must not import"),
    ("dependencies", "sparse_lm/train/loop.py", "import configs.quickstart", "sparse_lm must not import configs"),
    ("dependencies", "configs/a.py", "import configs.b\nimport sparse_lm.experiment", None),
    ("dependencies", "configs/a.py", "import experiments.train", "configs must not import experiments.train"),
    ("dependencies", "sparse_lm/novel/a.py", "", "novel has no level: add it to LEVELS"),
    ("sharding_table", "sparse_lm/sharding.py", "from jax.sharding import PartitionSpec", None),
    ("sharding_table", "tests/test_sharding.py", "from jax.sharding import PartitionSpec as P", None),
    ("sharding_table", IN_MOE, "\nfrom jax.sharding import PartitionSpec as P", f"{IN_MOE}:2: PartitionSpec outside"),
    ("sharding_table", IN_MOE, "x = jax.sharding.PartitionSpec('a')", "PartitionSpec outside"),
    ("sharding_table", "configs/a.py", "x = f().PartitionSpec", "PartitionSpec outside"),
    ("environment", "experiments/train.py", "from absl import flags\nimport os, sys\nos.environ, sys.argv", None),
    ("environment", IN_NN, "import os\nos.path.join('a')\nfrom absl import logging", None),
    ("environment", IN_NN, "from absl import flags", "absl.flags in sparse_lm/"),
    ("environment", IN_NN, "from absl.flags import FLAGS", "absl.flags.FLAGS in sparse_lm/"),
    ("environment", IN_NN, "from ml_collections import config_flags", "config_flags in sparse_lm/"),
    ("environment", IN_NN, "import os\nos.environ['A'] = '1'", f"{IN_NN}:2: os.environ in sparse_lm/"),
    ("environment", IN_NN, "from os import environ", "os.environ in sparse_lm/"),
    ("environment", IN_NN, "os.getenv('A')", "os.getenv in sparse_lm/"),
    ("environment", IN_NN, "name = sys.argv[1]", "sys.argv in sparse_lm/"),
    ("banned_constructs", IN_NN, "import picklelike\nmodel.eval()\nre.compile('x')", None),
    ("banned_constructs", IN_NN, "import pickle", "import of pickle: banned"),
    ("banned_constructs", "tests/test_x.py", "import torch.nn as nn", "import of torch.nn: banned"),
    ("banned_constructs", "sparse_lm/bench/hf_mixtral.py", "import torch", None),
    ("banned_constructs", "sparse_lm/bench/hf_mixtral.py", "import pickle", "import of pickle: banned"),
    ("banned_constructs", "tests/test_x.py", "import sparse_lm.bench.hf_mixtral", "start it by path"),
    ("banned_constructs", "experiments/a.py", "from sparse_lm.bench import hf_mixtral", "start it by path"),
    ("banned_constructs", "experiments/a.py", "from tensorflow import io", "import of tensorflow.io: banned"),
    ("banned_constructs", IN_NN, "def f():\n    import cloudpickle", "import of cloudpickle: banned"),
    ("banned_constructs", IN_NN, "from dill import loads", "import of dill.loads: banned"),
    ("banned_constructs", IN_NN, "eval('1 + 1')", "eval() executes data"),
    ("banned_constructs", IN_NN, "\nexec(text)", f"{IN_NN}:2: exec() executes data"),
    ("banned_constructs", IN_NN, "os.system('ls')", "os.system() executes data"),
    ("banned_constructs", IN_NN, "subprocess.run('ls', shell=True)", "shell= is not literally False"),
    ("banned_constructs", IN_NN, "np.load(f, allow_pickle=True)", "allow_pickle= is not literally False"),
    ("banned_constructs", IN_NN, "np.load(f, allow_pickle=flag)", "allow_pickle= is not literally False"),
    ("banned_constructs", IN_NN, "np.load(f, allow_pickle=False)", None),
    ("banned_constructs", IN_NN, "load(name, trust_remote_code=True)", "trust_remote_code= is not literally False"),
    ("docstrings", IN_NN, DOC + "def _private(): ...\nclass _Private:\n  def __call__(self): ...", None),
    ("docstrings", IN_NN, DOC + 'def f():\n  """Purpose."""\n  def nested(): ...', None),
    ("docstrings", IN_NN, "import jax", f"{IN_NN}:1: the module has no docstring"),
    ("docstrings", IN_NN, DOC + "def f(): ...", f"{IN_NN}:2: f has no docstring"),
    ("docstrings", IN_NN, DOC + "class A: ...", "A has no docstring"),
    ("docstrings", IN_NN, DOC + 'class A:\n  """Purpose."""\n  def method(self): ...', "method has no docstring"),
    ("docstrings", "configs/a.py", DOC + "def get_config(): ...", None),
    ("docstrings", "tests/test_x.py", DOC + "def test_a(): ...", None),
    ("docstrings", "tests/test_x.py", "def test_a(): ...", "the module has no docstring"),
]


@pytest.mark.parametrize(("rule", "path", "text", "says"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)])
def test_rule_bites(rule, path, text, says):
    found = getattr(architecture, rule)(Source(path, text))
    assert len(found) == (says is not None), found
    assert says is None or says in found[0]


def test_every_rule_has_a_case_that_bites():
    assert {rule.__name__ for rule in architecture.RULES} == {rule for rule, _, _, says in CASES if says is not None}


def test_missing_package_is_named_at_any_depth():
    paths = ["sparse_lm/__init__.py", "sparse_lm/moe/routers/__init__.py", "sparse_lm/moe/routers/hash.py"]
    assert architecture.missing_packages(paths) == ["sparse_lm/moe/: no __init__.py"]
    assert architecture.missing_packages([*paths, "sparse_lm/moe/__init__.py", "tests/nn/test_a.py"]) == []


def test_ratio_counts_lines_that_are_not_blank():
    sources = [
        Source("sparse_lm/a.py", "x = 1\n\n\ny = 2\n"),
        Source("sparse_lm/nn/b.py", "z = 3"),
        Source(
            "tests/test_a.py",
            textwrap.dedent("""
            assert True

            # why
        """),
        ),
        Source("experiments/train.py", "a\nb\nc"),
    ]
    assert architecture.line_counts(sources) == (3, 2)


def test_modules_without_a_test_are_named():
    paths = [
        "sparse_lm/__init__.py",
        "sparse_lm/dims.py",
        "sparse_lm/moe/layer.py",
        "sparse_lm/moe/routers/top_k.py",
        "sparse_lm/data/config.py",
        "tests/test_config.py",
        "tests/test_dims.py",
        "tests/moe/test_routers_top_k.py",
        "tests/models/test_layer.py",
        "tests/moe/layer.py",
    ]
    named = [finding.split(":")[0] for finding in architecture.untested(paths, {})]
    assert named == ["sparse_lm/data/config.py", "sparse_lm/moe/layer.py"]
    covered = {"sparse_lm/data/config.py": "tests/test_config.py", "sparse_lm/moe/layer.py": "tests/test_dims.py"}
    assert architecture.untested(paths, covered) == []


def test_the_list_of_covered_modules_cannot_rot():
    paths = ["sparse_lm/dims.py", "sparse_lm/batch.py", "tests/test_dims.py"]
    covered = {
        "sparse_lm/gone.py": "tests/test_dims.py",
        "sparse_lm/dims.py": "tests/test_dims.py",
        "sparse_lm/batch.py": "tests/test_nowhere.py",
    }
    assert architecture.untested(paths, covered) == [
        "sparse_lm/gone.py: listed in COVERED_BY and not there",
        "sparse_lm/dims.py: has a test of its own, take it out of COVERED_BY",
        "tests/test_nowhere.py: named in COVERED_BY and not there",
    ]
