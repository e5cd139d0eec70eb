"""What the sections about feed-forward experts compute for themselves; test_analysis_page.py reads them."""

from __future__ import annotations

import numpy as np

from sparse_lm.analysis.sections import together_lift


def test_pairs_against_independent_choices_by_hand():
    # Of 8 tokens 4 have expert 0, 4 have 1, 2 have both: as by chance. Expert 2 always comes with 0.
    pairs = np.array([[4, 2, 2, 0], [2, 4, 0, 0], [2, 0, 2, 0], [0, 0, 0, 0]])
    ratios = together_lift(pairs, 8)
    assert ratios[0, 1] == 1.0 and ratios[0, 2] == ratios[2, 0] == 2.0 and ratios[1, 2] == 0
    assert np.isnan(np.diag(ratios)).all() and np.isnan(ratios[3]).all()
