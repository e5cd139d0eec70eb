"""The legend of shape letters says in its table what it says in its dictionary, and the package keeps to it."""

from __future__ import annotations

import itertools
import pathlib
import re

import pytest

import sparse_lm
from sparse_lm import dims

FILES = sorted(pathlib.Path(next(iter(sparse_lm.__path__))).rglob("*.py"))

# Letters that one module explains in its own docstrings: rows of an expert, whatever they are rows of.
LOCAL: dict[str, set[str]] = {}


def test_table_and_dictionary_agree():
    cells = [cell.strip() for row in re.findall(r"^\|(.+)\|$", dims.__doc__ or "", re.M)[2:] for cell in row.split("|")]
    table = {letter: words for letter, words in itertools.pairwise(cells) if len(letter) == 1}
    assert table.keys() == dims.LETTERS.keys()
    for letter, name in dims.LETTERS.items():
        first, *_ = name.split()
        assert first.rstrip("s") in table[letter] or set(name.split()) & set(table[letter].split()), letter


def test_letters_are_single_capitals():
    assert all(re.fullmatch("[A-Z]", letter) for letter in dims.LETTERS)
    assert len(set(dims.LETTERS.values())) == len(dims.LETTERS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_annotated_arrays_use_letters_of_the_legend(file):
    shapes = re.findall(r'\w+\[Array, "([^"]*)"\]', file.read_text(encoding="utf-8"))
    used = {word for shape in shapes for word in shape.split() if re.fullmatch("[A-Z]", word)}
    unknown = used - dims.LETTERS.keys() - LOCAL.get(file.stem, set())
    assert not unknown, f"{file}: {sorted(unknown)} not in sparse_lm/dims.py"
