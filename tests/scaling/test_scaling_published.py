"""The table of published laws."""

from __future__ import annotations

import pytest

from sparse_lm.config import ConfigError
from sparse_lm.scaling.laws import Joint
from sparse_lm.scaling.published import JOINT, LAWS, PUBLISHED, UNIFIED_HASH, law_type, published


def test_every_kind_has_published_coefficients_under_its_name():
    assert set(LAWS) <= set(PUBLISHED)
    assert all(PUBLISHED[kind].kind == kind for kind in LAWS)
    assert {law.kind for law in PUBLISHED.values()} == set(LAWS)


def test_by_name():
    assert published("joint") is JOINT and law_type("joint") is Joint
    assert published("unified_hash") is UNIFIED_HASH and UNIFIED_HASH.kind == "unified"


def test_unknown_names_are_answered_with_the_closest():
    with pytest.raises(ConfigError, match="did you mean 'chinchilla'"):
        published("chinchila")
    with pytest.raises(ConfigError, match="did you mean 'unified'"):
        law_type("unified_hash")
