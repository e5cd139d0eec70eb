"""How often each token id is routed in training: what balanced hash routing has to know of the data."""

from __future__ import annotations

import numpy as np

from sparse_lm.data.config import DataConfig
from sparse_lm.data.loader import build_dataset
from sparse_lm.data.packing import PackedRows
from sparse_lm.data.synthetic import FactRows


def token_counts(config: DataConfig, seed: int = 0) -> tuple[float, ...]:
    """How often each id, from 0 to the end of the vocabulary, is an input of the model in one epoch of training rows.

    For `Hash(mode="balanced", frequencies=token_counts(data))`. The last token of a row is predicted and never an
    input, and padding is not counted. Rows of facts have no end: for them it is the expectation for one row. `seed`
    orders the documents as in `build_dataset`, which decides where rows end, so that counts of another seed differ a
    little. Reads the data; raises as `build_dataset` does.
    """
    dataset = build_dataset(config, seed)
    if isinstance(dataset.train, FactRows):
        return _expected(dataset.train)
    assert isinstance(dataset.train, PackedRows)
    rows = dataset.train
    place = np.arange(rows.total)
    inputs = rows.tokens[: rows.total][place % rows.width < rows.width - 1]
    return tuple(np.bincount(inputs, minlength=dataset.vocab_size).astype(float).tolist())


def _expected(rows: FactRows) -> tuple[float, ...]:
    config, triples = rows.config, rows.triples
    known = np.bincount(rows.table.ravel(), minlength=config.num_values) / rows.table.size
    parts = [
        np.full(config.num_a, triples / config.num_a),
        np.full(config.num_b, triples / config.num_b),
        (triples - 1) * known,  # the last value is the end of the row
        np.ones(1),
    ]
    return tuple(np.concatenate(parts).tolist())
