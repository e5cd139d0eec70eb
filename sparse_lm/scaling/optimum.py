"""What a budget of training FLOPs is best spent on: sizes and tokens by a law, and the curves of equal FLOPs.

FLOPs are counted as each law's authors do (`Law.flops_per_token`), which is not how `sparse_lm.models.counts` counts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import minimize_scalar

from sparse_lm.config import ConfigError
from sparse_lm.scaling.laws import EXPANSION, LIMITS, Chinchilla, Granularity, Law

SIZES = (1e0, 1e24)  # parameters between which optima are searched
_GRID = 800
POWERS_OF_TWO = tuple(float(2**i) for i in range(9))


@dataclasses.dataclass(frozen=True)
class Optimum:
    """size: parameters, as the law's first column counts them. fixed: what was given beside the budget."""

    flops: float
    size: float
    tokens: float
    loss: float
    fixed: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class IsoFlop:
    """A curve of equal FLOPs: size, tokens and loss are arrays of one length."""

    flops: float
    size: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


def needed(law: Law) -> tuple[str, ...]:
    """The columns that a budget leaves open beside size and tokens."""
    return tuple(name for name in law.columns[1:] if name != "tokens")


def costly(law: Law) -> tuple[str, ...]:
    """The same, and what only changes FLOPs: routers cost by the number of experts, which that law does not contain."""
    return (*needed(law), *(("experts",) if isinstance(law, Granularity) else ()))


def iso_flop(law: Law, flops: float, sizes: Sequence[float] | np.ndarray, fixed: Mapping[str, float]) -> IsoFlop:
    """Losses of models of these sizes, each trained on as many tokens as `flops` are good for.

    fixed: the law's other columns. Raises `ConfigError` when one is missing, unknown or out of range, when `flops` is
    not positive, and where the law has no tokens.
    """
    if not (np.isfinite(flops) and flops > 0):
        raise ConfigError("flops", flops, "must be greater than 0 and finite")
    _check_fixed(law, fixed)
    size = np.asarray(sizes, float)
    tokens = flops / law.flops_per_token(size, fixed)
    columns = {name: np.full_like(size, fixed[name]) for name in needed(law)}
    return IsoFlop(flops, size, tokens, law.loss(**{law.columns[0]: size, "tokens": tokens}, **columns))


def optimum(law: Law, flops: float, **fixed: float) -> Optimum:
    """The size with the lowest loss for a budget, searched numerically.

    Raises `ConfigError` as `iso_flop` does, and when the loss is lowest at an end of `SIZES`.
    """
    grid = np.linspace(np.log(SIZES[0]), np.log(SIZES[1]), _GRID)
    losses = iso_flop(law, flops, np.exp(grid), fixed).loss
    best = int(np.argmin(losses))
    if best in (0, _GRID - 1):
        raise ConfigError(
            "flops", flops, f"the law {law.kind} has its lowest loss outside of sizes {SIZES}: no optimum"
        )

    def loss(log_size: float) -> float:
        return float(iso_flop(law, flops, np.exp([log_size]), fixed).loss[0])

    found = minimize_scalar(loss, bounds=(grid[best - 1], grid[best + 1]), method="bounded", options={"xatol": 1e-10})
    at = iso_flop(law, flops, np.exp([found.x]), fixed)
    return Optimum(flops, float(at.size[0]), float(at.tokens[0]), float(at.loss[0]), dict(fixed))


def closed_form(law: Chinchilla, flops: float) -> Optimum:
    """The same for L = e + a / N^alpha + b / D^beta and 6 N D FLOPs: Hoffmann et al. 2022, equation 4.

    For a number of experts of the joint law use `law.at(experts)` (equation 7 of Ludziejewski et al. 2025).
    """
    both = law.alpha + law.beta
    ratio = (law.alpha * law.a / (law.beta * law.b)) ** (1 / both)
    size, tokens = ratio * (flops / 6) ** (law.beta / both), (flops / 6) ** (law.alpha / both) / ratio
    return Optimum(flops, size, tokens, float(law.loss(active=size, tokens=tokens)), {})


def best_granularity(
    law: Granularity, flops: float, experts: float = EXPANSION, choices: Sequence[float] = POWERS_OF_TWO
) -> Optimum:
    """Size, tokens and granularity together: the best of `choices`. experts: the expansion, which costs routing."""
    return min((optimum(law, flops, granularity=g, experts=experts) for g in choices), key=lambda one: one.loss)


def _check_fixed(law: Law, fixed: Mapping[str, float]) -> None:
    wanted = needed(law)
    for name in wanted:
        if name not in fixed:
            raise ConfigError(name, None, f"is needed: the law {law.kind} depends on it; give a number")
    for name, value in fixed.items():
        if name not in costly(law):
            raise ConfigError(name, value, f"the law {law.kind} does not depend on it; leave it out")
        low, closed, high = LIMITS[name]
        if not (low < value or (closed and value == low)) or not value < high:
            raise ConfigError(
                name, value, f"must be {'at least' if closed else 'greater than'} {low:g} and below {high:g}"
            )
