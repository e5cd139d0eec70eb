"""Where text comes from: the running Python's own files, or files of the user."""

from __future__ import annotations

import ast
import csv
import functools
import gzip
import importlib
import importlib.metadata
import inspect
import io
import json
import os
import re
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.data.documents import BOM, Corpus, DataError, SourceFile, take_documents

# Not text that anyone wrote (tables of codecs), text that the docs domain has anyway (pydoc_data), tests, and what
# depends on the environment rather than on the Python.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}
STDLIB_EXCLUDED |= {"encodings", "pydoc_data", "__pycache__"}
LICENSE_FILE = re.compile(r"\.dist-info/(.*/)?(LICEN[CS]E|COPYING|NOTICE)[^/]*$", re.IGNORECASE)
TEXT_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
DEFAULT_DOMAIN = "text"


def stdlib_documents(max_bytes: int | None = None) -> Corpus:
    """Text that every machine with Python has, in up to three domains; nothing is downloaded.

    `code`: sources of the standard library. `docs`: their docstrings, and the language reference that `help()` shows.
    `license`: license texts of Python and of the installed distributions, each text once.
    A module's code and docstrings have the same document name, so that no docstring is trained on and held out both.
    The same interpreter and environment give the same documents. Raises `ConfigError` when there is no text at all.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = _stdlib_modules(root)
    files = {
        "code": [SourceFile(name, functools.partial(_raw, name, path)) for name, path in modules],
        "docs": [SourceFile(name, functools.partial(_docs, name, path)) for name, path in modules] + _topics(),
        "license": _licenses(root),
    }
    corpus = take_documents(files, "replace", max_bytes)
    if not corpus.documents:
        raise ConfigError(
            "data.source",
            "stdlib",
            f"no Python sources under {root} and no license texts; set data.source=text and data.path",
        )
    return corpus


def _stdlib_modules(root: Path) -> list[tuple[str, Path]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_EXCLUDED]
        paths = [Path(folder, name) for name in names if name.endswith(".py")]
        found += [(path.relative_to(root).as_posix(), path) for path in paths]
    return sorted(found)


def _raw(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    yield name, path.read_bytes()


def _docs(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in others' strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return  # no Python of this version, thus without docstrings; its text is in the code domain
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    texts = list(_docstrings(tree, module))
    if texts:
        # A docstring may hold a lone surrogate as an escape, which UTF-8 cannot say.
        yield name, "\n\n".join(texts).encode("utf-8", "replace")


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield f"{name}\n\n{text}"
        for child in node.body:
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _docstrings(child, f"{name}.{child.name}")


def _topics() -> list[SourceFile]:
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except (ImportError, AttributeError):  # some distributions package it apart
        return []

    def read(name: str, text: str) -> Iterator[tuple[str, bytes]]:
        yield name, inspect.cleandoc(text).encode("utf-8", "replace")

    named = {f"topics/{topic}": text for topic, text in topics.items()}
    return [SourceFile(name, functools.partial(read, name, text)) for name, text in sorted(named.items())]


def _licenses(root: Path) -> list[SourceFile]:
    found: dict[str, Path] = {}
    for path in (root / "LICENSE.txt", Path(sys.base_prefix, "LICENSE.txt"), Path(sys.base_prefix, "LICENSE")):
        if path.is_file():
            found.setdefault("python/LICENSE", path)
    for distribution in importlib.metadata.distributions():
        # The record as text: `distribution.files` makes an object for each of thousands of files.
        lines = [line for line in (distribution.read_text("RECORD") or "").splitlines() if ".dist-info/" in line]
        for record in csv.reader(lines):
            if record and LICENSE_FILE.search(record[0]):
                found.setdefault(record[0].replace("\\", "/"), Path(str(distribution.locate_file(record[0]))))
    seen: set[bytes] = set()

    def read(name: str, path: Path) -> Iterator[tuple[str, bytes]]:
        try:
            data = path.read_bytes()
        except OSError:  # recorded, but removed since
            return
        if data not in seen:
            seen.add(data)
            yield name, data

    return [SourceFile(name, functools.partial(read, name, path)) for name, path in sorted(found.items())]


def text_documents(config: DataConfig) -> Corpus:
    """Documents of the file or folder `config.path`: txt, md, py, jsonl, each optionally .gz.

    A file is a document, a record of a jsonl file is one, named `file:line`. A folder is read recursively, hidden
    names and links to folders left out; the first folder under it names the domain, `text` where there is none.
    Raises `ConfigError` when the path holds no such files, `DataError` naming file and line when one is broken.
    """
    root = Path(config.path or "")
    if not root.exists():
        raise ConfigError("data.path", config.path, "no such file or folder")
    paths = [root] if root.is_file() else _text_files(root)
    files: dict[str, list[SourceFile]] = {}
    for path in paths:
        if not _suffix(path.name):
            raise ConfigError("data.path", config.path, f"expected {', '.join(TEXT_SUFFIXES)}, each optionally .gz")
        name = path.name if path == root else path.relative_to(root).as_posix()
        domain = name.split("/")[0] if "/" in name else DEFAULT_DOMAIN
        read = functools.partial(_read_text, name, path, config.jsonl_field)
        files.setdefault(domain, []).append(SourceFile(name, read))
    if not files:
        raise ConfigError(
            "data.path",
            config.path,
            f"holds no files named {', '.join('*' + s for s in TEXT_SUFFIXES)}, or .gz of them",
        )
    corpus = take_documents(files, config.invalid_utf8, config.max_bytes)
    if not corpus.documents:
        raise ConfigError(
            "data.path",
            config.path,
            f"no text in {len(paths)} file(s): {corpus.intake.empty} documents are empty, {corpus.intake.skipped} were "
            "skipped as undecodable; check the files, data.jsonl_field and data.invalid_utf8",
        )
    return corpus


def _text_files(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".") and _suffix(name)]
    return sorted(found)


def _suffix(name: str) -> str | None:
    plain = name.lower().removesuffix(".gz")
    return next((suffix for suffix in TEXT_SUFFIXES if plain.endswith(suffix)), None)


def _read_text(name: str, path: Path, field: str) -> Iterator[tuple[str, bytes]]:
    line = 0
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as stream:
            if _suffix(path.name) != ".jsonl":
                yield name, stream.read()
                return
            for line, record in enumerate(_lines(stream), start=1):
                if record.strip():
                    yield f"{name}:{line}", _jsonl_text(record, f"{path}, line {line}", field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        place = f"{path}, after line {line}" if line else f"{path}"
        raise DataError(f"{place}: broken gzip file ({error}); fetch it again, or remove it from data.path") from error


def _lines(stream: Iterable[bytes] | io.BufferedIOBase) -> Iterator[bytes]:
    for number, line in enumerate(stream):
        yield line.removeprefix(BOM) if number == 0 else line


def _jsonl_text(record: bytes, place: str, field: str) -> bytes:
    try:
        # Undecodable bytes become lone surrogates and turn back into the same bytes below, for `clean` to judge.
        value = json.loads(record.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON ({error}); a jsonl file has one record per line") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        has = f"keys {', '.join(sorted(value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise DataError(f"{place}: no text in field {field!r} (found {has}); set data.jsonl_field")
    text = value[field]
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        # A surrogate written as an escape: bytes that are not UTF-8, so that the same rule applies.
        return text.encode("utf-8", "surrogatepass")
