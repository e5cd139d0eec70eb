"""One finished run that the tests of training look at; nobody writes to it."""

from __future__ import annotations

import io

import pytest
import tiny

from sparse_lm.train.session import Session, train


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> tuple[Session, str]:
    """A run of twelve steps on all eight devices, and what it told."""
    stream = io.StringIO()
    return train(tiny.experiment(), tmp_path_factory.mktemp("runs") / "finished", stream), stream.getvalue()


@pytest.fixture(scope="session")
def workdir(finished):
    """The directory of the finished run."""
    return finished[0].report.parent
