"""The one batch type that data produces and objectives consume."""

from __future__ import annotations

import dataclasses

import jax
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """Packed rows of `length + 1` tokens. Arrays are numpy on the host and jax on the devices.

    tokens_BL: token ids.
    segments_BL: 0 is padding; otherwise the number (from 1) of the document within its row. Attention never crosses.
    positions_BL: index of the token within its document's part of this row, from 0.
    targets_BL: 1 where predicting *this* token from the ones before counts in the loss, else 0. A row's first token
        and a document's first token are never predicted, whatever stands here.
    domains_BL: which domain of the corpus the token belongs to (an index into `Dataset.domains`).
    """

    tokens_BL: Int[Array, "B L"]
    segments_BL: Int[Array, "B L"]
    positions_BL: Int[Array, "B L"]
    targets_BL: Int[Array, "B L"]
    domains_BL: Int[Array, "B L"]
