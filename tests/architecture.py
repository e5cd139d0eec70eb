"""The rules of the house as checkers: each takes sources and returns its findings, `path:line: what and the way out`.

`tests/test_architecture.py` runs them over the repository, and over small bad snippets to show that each one bites.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator

PACKAGE = "sparse_lm"
FOLDERS = (PACKAGE, "experiments", "configs", "tests")

MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70
MAX_PARAMETERS = 8
MAX_MAIN_LINES = 80
MIN_TEST_RATIO = 0.8

# Each level may import from the levels before it. Within a level nothing imports its neighbours, but for level 0 and
# the exceptions below.
LATE = ("train", "finetune", "multitask", "meta", "evals", "generate")
LEVELS: tuple[tuple[str, ...], ...] = (
    ("config", "dims", "batch", "memory", "mesh", "products", "threefry", "sharding", "rules"),
    ("nn",),
    ("moe",),
    ("models",),
    ("objectives", "optim", "data", "telemetry"),
    tuple(f"{unit}.config" for unit in LATE),  # declarations only, so that the root configuration can hold them
    ("experiment",),
    LATE,
    ("planning", "scaling", "interop", "bench", "study", "analysis"),
)
EXCEPTIONS = {("finetune", "train"), ("multitask", "train"), ("meta", "train"), ("train", "evals")}
LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}

BANNED_MODULES = {"tensorflow", "torch", "pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal"}
# Scripts for another Python environment, which nothing imports: started by path, they may use what that one has.
FOREIGN = {"sparse_lm/bench/hf_mixtral.py": {"torch"}}
BANNED_CALLS = {"eval", "exec"}
BANNED_KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclasses.dataclass(frozen=True)
class Source:
    """One Python file: its path from the repository's root, with forward slashes, and its text."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The parsed text."""
        return ast.parse(self.text, self.path)

    @property
    def folder(self) -> str:
        """The first folder of the path."""
        return self.path.split("/")[0]

    @property
    def module(self) -> str:
        """The dotted name; a package's `__init__` has the name of the package."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def num_lines(self) -> int:
        """All lines, blank ones included."""
        return len(self.text.splitlines())

    def functions(self) -> Iterator[Function]:
        """Every function and method, nested ones included."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def at(self, node: ast.AST, message: str) -> str:
        """A finding at a node."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {message}"


def load(root: pathlib.Path) -> list[Source]:
    """Every Python file of the folders under the rules."""
    files = [file for folder in FOLDERS for file in sorted((root / folder).rglob("*.py"))]
    return [Source(file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")) for file in files]


def file_length(source: Source) -> list[str]:
    """Files, and more so the mains, stay short enough to be read at once."""
    limit = MAX_MAIN_LINES if source.folder == "experiments" else MAX_FILE_LINES
    if source.num_lines <= limit:
        return []
    return [f"{source.path}:1: {source.num_lines} lines, at most {limit}: split it by purpose"]


def function_length(source: Source) -> list[str]:
    """Functions stay short."""
    sizes = [(node, (node.end_lineno or node.lineno) - node.lineno + 1) for node in source.functions()]
    return [
        source.at(node, f"{node.name} has {size} lines, at most {MAX_FUNCTION_LINES}: give a part of it a name")
        for node, size in sizes
        if size > MAX_FUNCTION_LINES
    ]


def parameter_count(source: Source) -> list[str]:
    """Functions take few parameters; `self` and `cls` do not count."""
    found = []
    for node in source.functions():
        given = node.args
        names = [
            arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if arg
        ]
        count = len(names) - (names[:1] in (["self"], ["cls"]))
        if count > MAX_PARAMETERS:
            found.append(source.at(node, f"{node.name} takes {count} parameters, at most {MAX_PARAMETERS}: group them"))
    return found


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """(node, full dotted name) of everything imported, relative imports resolved."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = source.module.split(".")
            if not source.path.endswith("__init__.py"):
                parts = parts[:-1]
            base = parts[: len(parts) - node.level + 1] if node.level else []
            base = [*base, node.module] if node.module else base
            yield from ((node, ".".join([*base, alias.name])) for alias in node.names)


def unit_of(name: str) -> str | None:
    """The unit of `LEVELS` that a dotted name of the package belongs to; None for the bare package itself."""
    parts = name.split(".")[1:]
    if not parts or parts[0].startswith("__"):
        return None
    return f"{parts[0]}.config" if parts[0] in LATE and parts[1:2] == ["config"] else parts[0]


def dependencies(source: Source) -> list[str]:
    """Imports go from later levels to earlier ones; nothing imports the configs, the mains or the tests."""
    if source.folder not in (PACKAGE, "configs"):
        return []
    unit = unit_of(source.module) if source.folder == PACKAGE else None
    if unit is not None and unit not in LEVEL_OF:
        return [f"{source.path}:1: {unit} has no level: add it to LEVELS in tests/architecture.py"]
    found = []
    for node, name in imports(source):
        head = name.split(".")[0]
        if head in FOLDERS and head != PACKAGE and (head != source.folder or head == "experiments"):
            found.append(source.at(node, f"{source.folder} must not import {name}"))
        target = unit_of(name) if head == PACKAGE else None
        if unit is not None and target in LEVEL_OF and not _may_import(unit, target):
            found.append(source.at(node, f"{unit} must not import {name}: {target} is not on an earlier level"))
    return found


def _may_import(unit: str, target: str) -> bool:
    own_config = target == f"{unit}.config"
    both_shared = LEVEL_OF[unit] == LEVEL_OF[target] == 0
    earlier = LEVEL_OF[target] < LEVEL_OF[unit]
    return unit == target or own_config or both_shared or earlier or (unit, target) in EXCEPTIONS


def sharding_table(source: Source) -> list[str]:
    """One module spells partitions; tests may, to state what they expect."""
    if source.folder == "tests" or source.path == f"{PACKAGE}/sharding.py":
        return []
    return [
        source.at(node, "PartitionSpec outside sparse_lm/sharding.py: use Rules")
        for node in ast.walk(source.tree)
        if "PartitionSpec" in _names(node)
    ]


def environment(source: Source) -> list[str]:
    """The package reads neither flags nor the environment: its callers pass values."""
    if source.folder != PACKAGE:
        return []
    banned = {"absl.flags", "ml_collections.config_flags", "os.environ", "os.getenv", "sys.argv"}
    found = [(node, name) for node, name in imports(source) for word in banned if f"{name}.".startswith(f"{word}.")]
    found += [(node, name) for node in ast.walk(source.tree) if (name := _dotted(node)) in banned]
    return [
        source.at(node, f"{name} in {PACKAGE}/: only experiments/ reads flags and environment") for node, name in found
    ]


def banned_constructs(source: Source) -> list[str]:
    """No second framework (but see `FOREIGN`), nothing that executes data, and nobody imports what is foreign."""
    found = [
        source.at(node, f"import of {name}: banned, see SECURITY.md")
        for node, name in imports(source)
        if name.split(".")[0] in BANNED_MODULES - FOREIGN.get(source.path, set())
    ]
    foreign = {Source(path, "").module for path in FOREIGN}
    found += [
        source.at(node, f"import of {name}: it is for another environment; start it by path")
        for node, name in imports(source)
        if any(f"{name}.".startswith(f"{module}.") for module in foreign)
    ]
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func)
        if called in BANNED_CALLS or called in ("os.system", "os.popen", "builtins.eval", "builtins.exec"):
            found.append(source.at(node, f"{called}() executes data: banned, see SECURITY.md"))
        found += [
            source.at(node, f"{keyword.arg}= is not literally False: banned, see SECURITY.md")
            for keyword in node.keywords
            if keyword.arg in BANNED_KEYWORDS
            and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
        ]
    return found


def docstrings(source: Source) -> list[str]:
    """Public modules, classes, functions and methods say what they are for."""
    found = [] if ast.get_docstring(source.tree) else [f"{source.path}:1: the module has no docstring"]
    if source.folder == "tests":
        return found
    excused = {"get_config"} if source.folder == "configs" else set()
    for scope in ast.walk(source.tree):
        if not isinstance(scope, ast.Module | ast.ClassDef):
            continue
        for node in scope.body:
            if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_") or node.name in excused:
                continue
            if not ast.get_docstring(node):
                found.append(source.at(node, f"{node.name} has no docstring"))
    return found


RULES: tuple[Callable[[Source], list[str]], ...] = (
    file_length,
    function_length,
    parameter_count,
    dependencies,
    sharding_table,
    environment,
    banned_constructs,
    docstrings,
)


def missing_packages(paths: Iterable[str]) -> list[str]:
    """Every folder of the package that holds Python, at any depth, is a package."""
    inside = {path for path in paths if path.startswith(f"{PACKAGE}/")}
    folders = {parent.as_posix() for path in inside for parent in pathlib.PurePosixPath(path).parents} - {"."}
    return [f"{folder}/: no __init__.py" for folder in sorted(folders) if f"{folder}/__init__.py" not in inside]


def line_counts(sources: Iterable[Source]) -> tuple[int, int]:
    """(lines of code, lines of test), blank lines left out."""
    lines = {PACKAGE: 0, "tests": 0}
    for source in sources:
        if source.folder in lines:
            lines[source.folder] += sum(1 for line in source.text.splitlines() if line.strip())
    return lines[PACKAGE], lines["tests"]


def untested(paths: Iterable[str], covered_by: dict[str, str]) -> list[str]:
    """Modules without a test named after them, and entries of `covered_by` that are wrong or no longer needed.

    The test of `sparse_lm/moe/routers/top_k.py` is a `test_*.py` with `top_k` in its name and `moe` or `routers` in
    its path; a module at the top of the package needs its own name only.
    """
    paths = set(paths)
    tests = [path for path in paths if path.startswith("tests/") and path.split("/")[-1].startswith("test_")]
    modules = {path for path in paths if path.startswith(f"{PACKAGE}/") and not path.endswith("__init__.py")}
    mirrored = {module for module in modules if any(_mirrors(test, module) for test in tests)}
    found = [f"{path}: listed in COVERED_BY and not there" for path in sorted({*covered_by} - modules)]
    found += [f"{path}: has a test of its own, take it out of COVERED_BY" for path in sorted({*covered_by} & mirrored)]
    found += [f"{test}: named in COVERED_BY and not there" for test in sorted({*covered_by.values()} - paths)]
    found += [
        f"{path}: no test is named after it; add one, or name in COVERED_BY the test that covers it"
        for path in sorted(modules - mirrored - {*covered_by})
    ]
    return found


def _mirrors(test: str, module: str) -> bool:
    *packages, name = module.removesuffix(".py").split("/")[1:]
    words = set(test.removesuffix(".py").replace("_", "/").split("/"))
    in_package = any(set(package.split("_")) <= words for package in packages)
    return f"_{name}_" in f"{test.split('/')[-1].removesuffix('.py')}_" and (in_package or not packages)


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _names(node: ast.AST) -> set[str]:
    """The names a node itself spells, including those it imports."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.name.split(".")[-1] for alias in node.names}
    last = _dotted(node).split(".")[-1]
    return {last} if last else {node.attr} if isinstance(node, ast.Attribute) else set()
