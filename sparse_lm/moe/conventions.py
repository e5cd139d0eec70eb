"""From other codebases' numbers to ours: load-balance coefficients and capacity factors that mean the same.

Here the load-balance loss is E * sum_e f_e P_e with f the share of the routed assignments (sum 1), added once per
sparse layer, and capacity is ceil(factor * k * S / E). A family is described by what its loss is at perfect balance, by
how it joins layers, and by whether its capacity factor leaves k out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from sparse_lm.config import ConfigError, closest


@dataclasses.dataclass(frozen=True)
class Family:
    """A codebase's (or paper's) conventions.

    scale: its load-balance loss divided by ours on the same routing, from (k, E). layers: how the losses of the layers
    are joined; `pooled` averages f and P over layers before they are multiplied, which equals the mean only where the
    layers are balanced alike. capacity_has_k: whether k is a factor of its capacity. first_choice: it counts only first
    choices in f, which equals ours only where all choices are distributed alike.
    """

    scale: Callable[[int, int], float]
    layers: Literal["sum", "mean", "pooled"]
    capacity_has_k: bool | None
    first_choice: bool = False


def _one(k: int, experts: int) -> float:
    return 1.0


FAMILIES: dict[str, Family] = {
    "sparse_lm": Family(_one, "sum", True),
    "hf_mixtral": Family(lambda k, experts: float(k), "pooled", None),
    "maxtext": Family(lambda k, experts: float(k), "sum", True),
    "flaxformer": Family(lambda k, experts: float(k), "mean", False),
    "mesh_tf": Family(_one, "sum", False, first_choice=True),
    "megatron": Family(_one, "sum", True),
    "megablocks": Family(_one, "mean", True),
    "deepseek": Family(_one, "sum", None),
    "levanter": Family(lambda k, experts: 1.0 / k, "sum", None),
    "gshard_paper": Family(lambda k, experts: 1.0 / experts**2, "sum", True, first_choice=True),
    "moe_plus_plus": Family(lambda k, experts: k / experts, "sum", None),
}


def convert_coefficient(value: float, source: str, *, top_k: int, num_experts: int, sparse_layers: int) -> float:
    """The `balance.load` here that weighs the load-balance loss as `value` does in `source` (a key of `FAMILIES`).

    Exact where `Family.first_choice` is False and layers are not pooled, else for equally balanced choices or layers.
    Raises `ConfigError` on an unknown family or a size below 1.
    """
    family = _family(source)
    for key, size in (("top_k", top_k), ("num_experts", num_experts), ("sparse_layers", sparse_layers)):
        if size < 1:
            raise ConfigError(key, size, "must be at least 1")
    return value * family.scale(top_k, num_experts) / (1 if family.layers == "sum" else sparse_layers)


def convert_capacity(factor: float, source: str, *, top_k: int) -> float:
    """The `capacity_factor` here that gives as many slots as `factor` does in `source`, up to its rounding.

    Raises `ConfigError` on an unknown family, and on one that has no capacity.
    """
    family = _family(source)
    if family.capacity_has_k is None:
        raise ConfigError("source", source, "routes without a capacity; set capacity_factor=None")
    return factor if family.capacity_has_k else factor / top_k


def _family(source: str) -> Family:
    if source not in FAMILIES:
        raise ConfigError("source", source, f"unknown convention; {closest(source, FAMILIES)}")
    return FAMILIES[source]
