"""The notebooks: one text with the Python files beside them, nothing defined in them, each runs from top to bottom."""

from __future__ import annotations

import ast
import importlib.util
import os
import pathlib
import runpy
import shutil
import subprocess
import sys
from typing import Any

import architecture
import jupytext
import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "colab"
NAMES = ("paper_table", "plan_a_pod", "quickstart", "router", "specialisation")
DEFINE = {"router": {"Cosine", "CosineRouter"}}  # whose purpose it is
SECONDS = 600  # for a cell, on a busy machine; an idle one with two cores takes less than 180 for a whole notebook


def url() -> str:
    """The one place where the repository's address is declared."""
    (line,) = [line for line in (ROOT / "setup.py").read_text().splitlines() if line.strip().startswith("url=")]
    return line.split('"')[1]


def source(name: str) -> str:
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def cells(name: str, suffix: str = ".py") -> list[Any]:
    return jupytext.read(FOLDER / f"{name}{suffix}").cells


def code(name: str) -> list[str]:
    return [cell.source for cell in cells(name) if cell.cell_type == "code"]


def test_these_are_the_notebooks():
    for suffix in (".py", ".ipynb"):
        assert sorted(path.stem for path in FOLDER.glob(f"*{suffix}")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_says_what_its_python_file_says(name):
    both = [[(cell.cell_type, cell.source) for cell in cells(name, suffix)] for suffix in (".py", ".ipynb")]
    assert both[0] == both[1], "make notebooks writes the newer of the two into the other"


@pytest.mark.parametrize("name", NAMES)
def test_no_output_is_kept(name):
    stored = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    assert stored.nbformat == 4 and stored.metadata.kernelspec.name == "python3"
    assert not [cell for cell in stored.cells if cell.get("outputs") or cell.get("execution_count")], (
        "clear all outputs and save: diffs shall show what a person has written"
    )


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_import_and_do_not_define(name):
    tree = ast.parse(source(name))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert {node.name for node in tree.body if isinstance(node, kinds)} == DEFINE.get(name, set())
    assert not architecture.banned_constructs(architecture.Source(f"colab/{name}.py", source(name)))
    assert not [line for line in source(name).splitlines() if line.startswith(("%", "!"))], (
        "no magics: it is Python too"
    )
    longest = max(len(text.splitlines()) for text in code(name)[2:] if not text.startswith("@"))
    assert longest <= 15, "a cell of more lines shows that a function is missing in the package"


@pytest.mark.parametrize("name", NAMES)
def test_first_a_link_to_colab_then_what_sets_it_up(name):
    first, second, *_ = cells(name)
    assert first.cell_type == "markdown" and second.cell_type == "code"
    link = f"colab.research.google.com/github/{url().removeprefix('https://github.com/')}/blob/main/colab/{name}.ipynb"
    assert link in first.source and link in (ROOT / "README.md").read_text()
    assert second.source == code(NAMES[0])[0] and f'"{url()}"' in second.source


@pytest.mark.parametrize("name", NAMES)
def test_files_of_the_repository_that_it_names_are_there(name):
    named = [part.split('"')[0] for part in source(name).split('"../')[1:]]
    named += [part.split(")")[0] for part in source(name).split(f"]({url()}/blob/main/")[1:]]
    assert all((ROOT / path).is_file() for path in named), named
    assert named or name not in ("paper_table", "plan_a_pod", "specialisation")


class Setup:
    """The set-up cell in a folder of its own, on a machine that is only pretended."""

    def __init__(self, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.monkeypatch, self.commands = folder, monkeypatch, []
        self.missing, self.driver = {"sparse_lm", "jax_cuda12_plugin"}, ""
        (folder / "setup_cell.py").write_text(code(NAMES[0])[0])
        monkeypatch.chdir(folder)
        for name in [name for name in os.environ if name.startswith(("TPU_", "COLAB_TPU"))]:
            monkeypatch.delenv(name)
        monkeypatch.setattr(subprocess, "run", self.run)
        monkeypatch.setattr(shutil, "which", lambda name: name if self.driver else None)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in self.missing else True)

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess:
        self.commands.append(command)
        if command[0] == "git":
            (self.folder / command[-1] / "colab").mkdir(parents=True)
        failed = command[0] == "nvidia-smi" and self.driver == "broken"
        assert options.get("check") or command[0] == "nvidia-smi"
        return subprocess.CompletedProcess(command, int(failed), stdout=f"{self.driver}\n")

    def __call__(self) -> list[str]:
        """What was installed."""
        runpy.run_path(str(self.folder / "setup_cell.py"))
        return [command[-1] for command in self.commands if command[:3] == [sys.executable, "-m", "pip"]]


@pytest.fixture
def setup(tmp_path, monkeypatch) -> Setup:
    return Setup(tmp_path, monkeypatch)


def test_nothing_happens_where_the_package_is(setup):
    setup.missing.remove("sparse_lm")
    assert setup() == [] and setup.commands == []
    assert pathlib.Path.cwd() == setup.folder


@pytest.mark.parametrize(("driver", "plugin", "variable", "extra"), [
    ("", False, None, ""),
    ("", False, "TPU_ACCELERATOR_TYPE", "[tpu]"),
    ("", False, "COLAB_TPU_ADDR", "[tpu]"),
    ("580.95.05", False, None, "[cuda]"),
    ("550.54.15", False, None, "[cuda12]"),
    ("590.10", True, None, "[cuda12]"),
    ("broken", False, None, ""),
])  # fmt: skip
def test_the_extra_is_that_of_the_machine(setup, driver, plugin, variable, extra):
    setup.driver = driver
    if plugin:
        setup.missing.remove("jax_cuda12_plugin")
    if variable:
        setup.monkeypatch.setenv(variable, "v5litepod-1")
    assert setup() == [f"./sparse_lm_source{extra}"]
    assert [command[-2:] for command in setup.commands if command[0] == "git"] == [[url(), "sparse_lm_source"]]
    assert pathlib.Path.cwd() == setup.folder / "sparse_lm_source" / "colab"


def test_a_kernel_that_starts_again_finds_the_folder_again(setup):
    setup()
    setup.monkeypatch.chdir(setup.folder)
    setup.missing.clear()
    setup.commands.clear()
    assert setup() == [] and setup.commands == []
    assert pathlib.Path.cwd() == setup.folder / "sparse_lm_source" / "colab"
    setup()  # and there, the cell once more
    assert pathlib.Path.cwd() == setup.folder / "sparse_lm_source" / "colab"


def test_every_extra_that_is_installed_is_declared():
    declared = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": [' in declared for extra in ("cuda", "cuda12", "tpu"))


SHOWN = {
    "quickstart": ("validation loss", 2),
    "router": ("the task teaches the router", 2),
    "specialisation": ("shuffled at most", 1),
    "paper_table": ("Already two experts are better", 1),
    "plan_a_pod": ("the nearest change that fits", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_top_to_bottom(name, tmp_path):
    """In a kernel of its own, as a user has it: optimised programs, one device. Pages and words have to come out."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "colab").mkdir()
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    where = {"metadata": {"path": str(tmp_path / "colab")}}
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    nbclient.NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=where).execute(env=environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    words, pages = SHOWN[name]
    assert words in text, text[-2000:]
    assert sum("<iframe" in output.get("data", {}).get("text/html", "") for output in outputs) == pages
