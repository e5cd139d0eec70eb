"""A study's declaration is checked before anything runs."""

from __future__ import annotations

import pytest
import study_cases

from sparse_lm.config import ConfigError
from sparse_lm.study.claims import Less
from sparse_lm.study.study import Study, Variant, load_study


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "a/b"}, "use letters"),
        ({"variants": {"dense": Variant()}, "claims": ()}, "and not 'dense'"),
        ({"variants": {"with space": Variant()}, "claims": ()}, "use letters"),
        ({"claims": (Less("fore", "two", name="x", statement=""),)}, "did you mean 'four'"),
        ({"claims": (Less("four", "two", name="x", statement=""),) * 2}, "two claims"),
        ({"same_parameters": (("four", "six"),)}, "is no variant"),
        ({"scales": {}}, "toy, small, paper"),
        ({"flop_tolerance": 0.0}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        study_cases.study(**changes)


def test_claims_may_speak_of_the_baseline():
    assert study_cases.study(claims=(Less("two", "dense", name="x", statement=""),)).claims


def test_the_measure_follows_the_budget():
    assert study_cases.study().measure == "validation_loss"
    assert study_cases.study(budget="flops").measure == "validation_loss"
    assert study_cases.study(budget="time").measure == "loss_at_equal_time"


def test_variants_cannot_be_changed_afterwards():
    with pytest.raises(TypeError):
        study_cases.study().variants["x"] = Variant()  # type: ignore[index]


def test_a_file_with_a_study(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("import study_cases\nSTUDY = study_cases.study()\n")
    assert isinstance(load_study(file), Study)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.py", None, "there is no such file"),
        ("empty.py", "", "defines no STUDY"),
        ("other.py", "STUDY = 3", "defines no STUDY"),
        ("text.txt", "STUDY = 3", "is no Python file"),
    ],
)
def test_a_file_without_one(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_study(tmp_path / name)
