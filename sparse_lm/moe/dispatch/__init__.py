"""Dispatchers by name."""

from __future__ import annotations

from sparse_lm.moe.dispatch.all_to_all import AllToAll
from sparse_lm.moe.dispatch.base import Dispatcher
from sparse_lm.moe.dispatch.dense import Dense
from sparse_lm.moe.dispatch.dropless import Dropless
from sparse_lm.moe.dispatch.einsum import Einsum
from sparse_lm.moe.dispatch.gather import Gather
from sparse_lm.moe.dispatch.ragged_all_to_all import RaggedAllToAll

DISPATCHERS: dict[str, type[Dispatcher]] = {
    "dense": Dense,
    "einsum": Einsum,
    "gather": Gather,
    "dropless": Dropless,
    "all_to_all": AllToAll,
    "ragged_all_to_all": RaggedAllToAll,
}
