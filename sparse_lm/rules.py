"""Named strategies: values of the one rules table, for any mesh.

| strategy | experts | weights stored | optimizer state stored |
|---|---|---|---|
| `EP` | cut along `expert` | whole | as the weights |
| `ZERO1_EP` | cut along `expert` | whole | cut along `fsdp` and `data` |
| `FSDP_EP` (default) | cut along `expert` | cut along `fsdp` | as the weights |
| `HYBRID_EP` | cut along `expert` | cut along `fsdp` | cut along `fsdp` and `data` |
| `FSDP_OVER_EP` | cut along `expert` | cut along `fsdp`, dense ones along `expert` as well | as the weights |

An axis of size 1 cuts nothing: with mesh.expert=1, `EP` is plain data parallelism, `ZERO1_EP` is ZeRO-1 and `FSDP_EP`
is ZeRO-3 (Rajbhandari et al. 2020, 1910.02054, section 5). The axis `model` adds tensor parallelism to each of them,
also inside experts, and `context` cuts rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sparse_lm.sharding import DEFAULT, Rules

FSDP_EP = DEFAULT
EP = dataclasses.replace(DEFAULT, stored=())
ZERO1_EP = dataclasses.replace(EP, state=("fsdp", "data"))
HYBRID_EP = dataclasses.replace(FSDP_EP, state=("data",))
FSDP_OVER_EP = dataclasses.replace(FSDP_EP, dense=("expert",))

STRATEGIES: Mapping[str, Rules] = {
    "ep": EP,
    "zero1_ep": ZERO1_EP,
    "fsdp_ep": FSDP_EP,
    "hybrid_ep": HYBRID_EP,
    "fsdp_over_ep": FSDP_OVER_EP,
}
