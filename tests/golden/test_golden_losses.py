"""Losses of 50 steps of tiny trainings are what they were; see golden_cases.py for how to write them anew."""

from __future__ import annotations

import golden_cases
import numpy as np
import pytest


@pytest.mark.parametrize("name", golden_cases.CASES)
def test_losses_are_what_they_were(name):
    expected = np.loadtxt(golden_cases.path_of(name))
    got = np.array(golden_cases.losses(golden_cases.CASES[name]))
    assert got.shape == expected.shape == (golden_cases.STEPS,)
    early, why = golden_cases.EARLY, golden_cases.__doc__ or ""
    np.testing.assert_allclose(got[:early], expected[:early], rtol=golden_cases.TOLERANCE, err_msg=why)
    np.testing.assert_allclose(got[early:], expected[early:], rtol=golden_cases.LATE_TOLERANCE, err_msg=why)


@pytest.mark.parametrize("name", golden_cases.CASES)
def test_the_cases_learn(name):
    kept = np.loadtxt(golden_cases.path_of(name))
    assert kept[-5:].mean() < 0.97 * kept[:5].mean()


def test_every_file_has_its_case():
    assert {path.stem for path in golden_cases.HERE.glob("*.txt")} == {*golden_cases.CASES}
