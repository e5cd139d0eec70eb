"""Languages of domains: what the source of the data says, what is declared, and mistakes."""

from __future__ import annotations

import numpy as np
import pytest

from sparse_lm.analysis.languages import language_labels, languages, parse
from sparse_lm.config import ConfigError
from sparse_lm.data.config import DataConfig
from sparse_lm.data.sources import stdlib_documents

TEXT = DataConfig(source="text", path="corpus")


def test_declarations_are_parsed():
    assert parse(None) == parse("") == {}
    assert parse("en=English, src = C,German") == {"en": "English", "src": "C", "German": "German"}


@pytest.mark.parametrize(("declared", "word"), [("en=", "en="), ("=C", "=C"), ("a,,b", "''"), ("a=1,a=2", "1 already")])
def test_declarations_that_say_nothing_are_refused(declared, word):
    with pytest.raises(ConfigError, match=word) as error:
        parse(declared)
    assert error.value.key == "languages"


def test_what_the_source_of_the_data_tells():
    assert languages(DataConfig(), ("code", "docs", "license"), {}) == ("Python", "English", "English")
    chains = ("grammar000", "grammar001")
    assert languages(DataConfig(source="grammar"), chains, {}) == chains
    assert languages(DataConfig(source="facts", length=63), ("facts",), {}) == (None,)
    assert languages(TEXT, ("de", "python"), {}) == (None, None)  # a folder's name is no promise


def test_every_domain_of_the_standard_library_has_a_language():
    domains = sorted({document.domain for document in stdlib_documents(20_000).documents})
    assert domains and None not in languages(DataConfig(), domains, {})


def test_what_is_declared_comes_first():
    assert languages(TEXT, ("a", "b", "c"), {"c": "C", "a": "Ada"}) == ("Ada", None, "C")
    assert languages(DataConfig(), ("code", "docs"), {"code": "Cython"}) == ("Cython", "English")


def test_a_domain_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"languages='dox': is no domain.*did you mean 'docs'.*known: code, docs"):
        languages(DataConfig(), ("code", "docs"), {"dox": "English"})


def test_labels_by_hand():
    domain_M = np.array([0, 3, 1, 1, 2, 0])
    labels = language_labels(("Python", "English", None, "English", "Latin"), domain_M)
    assert labels.names == ("English", "Python")  # no token is Latin
    np.testing.assert_array_equal(labels.index_M, [1, 0, 0, 0, -1, 1])
    assert language_labels((None, None), np.array([0, 1])).names == ()
