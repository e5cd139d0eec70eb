"""Fits of scaling laws to points, robust and from many starts, with bootstrap intervals over points.

The objective is that of Hoffmann et al. 2022 (equation 3): the Huber loss of log L_predicted - log L_measured. Two
things differ from their L-BFGS from a grid, and change nothing about where the minimum is. Starts draw only what the
law is not linear in; the rest comes from non-negative least squares. And the descent is Gauss-Newton in a trust region
(`scipy.optimize.least_squares`) with exact derivatives, as suits a sum of residuals in the long flat valleys of these
laws.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.optimize import least_squares, nnls

from sparse_lm.config import ConfigError
from sparse_lm.data.documents import DataError
from sparse_lm.scaling.laws import Law
from sparse_lm.scaling.points import Points

_STEP = 1e-30  # of complex-step derivatives, whose error is its square
_SAME = 1e-4  # relative difference of objectives below which two starts have found the same minimum
_AT_BOUND = 1e-4
_TINY = 1e-8  # a linear coefficient of 0 has no logarithm: this share of the mean loss stands for it


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """delta: of the Huber loss, in nats of log loss: residuals beyond it count linearly.

    starts: random starts, of which `descents` with the lowest objective are followed. resamples: of the bootstrap; 0 is
    no intervals. confidence: of the intervals. seed: of starts and resamples.
    """

    delta: float = 1e-3
    starts: int = 400
    descents: int = 16
    resamples: int = 200
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self):
        """Raises `ConfigError` for numbers that make no fit."""
        for name, least in (("starts", 1), ("descents", 1), ("resamples", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"fit.{name}", getattr(self, name), f"must be at least {least}")
        if not self.delta > 0:
            raise ConfigError("fit.delta", self.delta, "must be greater than 0")
        if not 0 < self.confidence < 1:
            raise ConfigError("fit.confidence", self.confidence, "is a share: choose it between 0 and 1")


@dataclasses.dataclass(frozen=True)
class Interval:
    """Ends of a percentile interval."""

    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Fit:
    """law: with the fitted coefficients. objective: mean Huber loss. rmse: of log loss, every point alike.

    points: how many. at_bounds: coefficients that ended at a bound, which the points do not determine.
    agreeing: how many of the `descents` ended in the same minimum; few of them mean that the points do not determine
    the law. resamples: the laws of the bootstrap. intervals: of every coefficient, over them.
    """

    law: Law
    objective: float
    rmse: float
    points: int
    at_bounds: tuple[str, ...]
    agreeing: int
    descents: int
    resamples: tuple[Law, ...]
    intervals: Mapping[str, Interval]
    confidence: float

    def predicted(self, **columns: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss at `columns`, and the ends of its interval over the bootstrap (NaN without one)."""
        center = self.law.loss(**columns)
        if not self.resamples:
            return center, np.full_like(center, np.nan), np.full_like(center, np.nan)
        drawn = np.stack([law.loss(**columns) for law in self.resamples])
        low, high = np.quantile(drawn, _tails(self.confidence), axis=0)
        return center, low, high


def fit(kind: type[Law], points: Points, options: FitOptions = FitOptions()) -> Fit:
    """Fits a law to points.

    Raises `DataError` when points lack a column, are fewer than coefficients, or take fewer values in a column than the
    law can be told from, and `ConfigError` when no start is finite.
    """
    check_points(kind, points)
    problem = _Problem.of(kind, points, options.delta)
    generator = np.random.default_rng(options.seed)
    starts = [_start(problem, generator) for _ in range(options.starts)]
    ranked = sorted((start for start in starts if start is not None), key=problem.objective)
    found = sorted(_unique(problem, ranked[: options.descents]), key=lambda one: one[1])
    if not found:
        raise ConfigError("law", kind.kind, "no start had a finite loss; the points are outside of the law's range")
    theta, objective = found[0]
    agreeing = sum(other - objective <= _SAME * objective + 1e-15 for _, other in found)
    residuals = problem.residuals(theta)
    laws = tuple(_bootstrap(kind, points, theta, options, generator))
    low_high = (
        {
            name: np.quantile([law.values()[name] for law in laws], _tails(options.confidence))
            for name in kind.coefficients
        }
        if laws
        else {}
    )
    return Fit(
        law=problem.law(theta),
        objective=objective,
        rmse=float(np.sqrt(np.mean(residuals**2))),
        points=points.count,
        at_bounds=problem.at_bounds(theta),
        agreeing=agreeing,
        descents=len(found),
        resamples=laws,
        intervals={name: Interval(float(low), float(high)) for name, (low, high) in low_high.items()},
        confidence=options.confidence,
    )


def check_points(kind: type[Law], points: Points) -> None:
    """Raises `DataError` unless the points can determine the law: see `fit`."""
    for name in kind.columns:
        if name not in points.columns:
            raise DataError(
                f"{points.origin}: no column {name!r}, which the law {kind.kind} needs; there are "
                f"{', '.join(sorted(points.columns))}"
            )
    wanted = len(kind.coefficients)
    if points.count < wanted:
        raise DataError(
            f"{points.origin}: {points.count} points for the {wanted} coefficients of the law {kind.kind}; measure at "
            f"least {wanted}, better three times as many, or fit a law with fewer"
        )
    for name in kind.columns:
        distinct = len(np.unique(points.columns[name]))
        if distinct < 3:
            raise DataError(
                f"{points.origin}: {distinct} different values of {name!r}; a power law needs at least 3 to be told "
                "from a constant and a line"
            )


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Points and parametrisation: positive coefficients are fitted as logarithms."""

    kind: type[Law]
    names: tuple[str, ...]
    positive: np.ndarray
    low: np.ndarray
    high: np.ndarray
    columns: Any
    log_loss: np.ndarray
    delta: float

    @staticmethod
    def of(kind: type[Law], points: Points, delta: float) -> _Problem:
        """The problem of a law and points that are checked."""
        names = tuple(kind.coefficients)
        positive = np.array([kind.coefficients[name].positive for name in names])
        bounds = np.array([kind.coefficients[name].bounds for name in names])
        with np.errstate(all="ignore"):
            bounds = np.where(positive[:, None] & np.isfinite(bounds), np.log(np.abs(bounds)), bounds)
        columns = types.SimpleNamespace(**{name: points.columns[name] for name in kind.columns})
        low, high = bounds[:, 0], bounds[:, 1]
        return _Problem(kind, names, positive, low, high, columns, np.log(points.loss), delta)

    def coefficients(self, theta: np.ndarray) -> Any:
        """By name, from the vector that is searched."""
        values = np.where(self.positive, np.exp(np.where(self.positive, theta, 0)), theta)
        return types.SimpleNamespace(**dict(zip(self.names, values, strict=True)))

    def law(self, theta: np.ndarray) -> Law:
        """The law of a vector."""
        return self.kind(**{name: float(value) for name, value in vars(self.coefficients(theta)).items()})

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """Log of predicted over measured loss, for each point; complex for a complex vector."""
        with np.errstate(all="ignore"):
            found = np.log(self.kind.formula(self.coefficients(theta), self.columns))
        return found - self.log_loss

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """By complex steps: every formula is analytic in its coefficients, so these are exact."""
        steps = np.eye(len(theta)) * 1j * _STEP
        return np.stack([np.imag(self.residuals(theta + step)) / _STEP for step in steps], axis=1)

    def objective(self, theta: np.ndarray) -> float:
        """Mean Huber loss; infinite where the law is not finite."""
        size = np.abs(self.residuals(theta))
        huber = np.where(size <= self.delta, 0.5 * size**2, self.delta * (size - 0.5 * self.delta))
        return float(np.mean(huber)) if np.all(np.isfinite(huber)) else np.inf

    def at_bounds(self, theta: np.ndarray) -> tuple[str, ...]:
        """Names of the coefficients at a bound."""
        near = (theta - self.low < _AT_BOUND) | (self.high - theta < _AT_BOUND)
        return tuple(name for name, at in zip(self.names, near, strict=True) if at)

    def descend(self, theta: np.ndarray) -> tuple[np.ndarray, float]:
        """The minimum that a start leads to, and the objective there."""
        inside = np.clip(theta, self.low + 1e-9, self.high - 1e-9)
        # First without robustness: far from the minimum the Huber loss is an absolute value, whose kinks slow it down.
        for loss in ("linear", "huber"):
            with np.errstate(all="ignore"):  # of steps that are then rejected
                found = least_squares(
                    self.residuals,
                    inside,
                    self.jacobian,  # type: ignore[arg-type] - its stub knows the names of methods only
                    (self.low, self.high),
                    x_scale="jac",
                    loss=loss,
                    f_scale=self.delta,
                    ftol=1e-14,
                    xtol=1e-14,
                    gtol=1e-15,
                    max_nfev=300,
                )
            inside = found.x
        return inside, self.objective(inside)


def _start(problem: _Problem, generator: np.random.Generator) -> np.ndarray | None:
    """Random nonlinear coefficients, the linear ones by least squares; None where that is not finite."""
    table, drawn = problem.kind.coefficients, {}
    for name, one in table.items():
        if one.linear:
            drawn[name] = 0.0
        elif one.positive:
            drawn[name] = float(np.exp(generator.uniform(np.log(one.low), np.log(one.high))))
        else:
            drawn[name] = float(generator.uniform(one.low, one.high))
    linear = [name for name, one in table.items() if one.linear]
    with np.errstate(all="ignore"):
        basis = np.stack(
            [
                np.broadcast_to(
                    problem.kind.formula(types.SimpleNamespace(**drawn | {name: 1.0}), problem.columns),
                    problem.log_loss.shape,
                )
                for name in linear
            ],
            axis=1,
        )
        if problem.kind.log_linear:
            values = np.linalg.lstsq(np.log(basis), problem.log_loss, rcond=None)[0] if np.all(basis > 0) else None
        else:
            values = _nonnegative(basis, np.exp(problem.log_loss))
    if values is None or not np.all(np.isfinite(values)):
        return None
    drawn |= dict(zip(linear, values, strict=True))
    theta = np.array([np.log(drawn[name]) if table[name].positive else drawn[name] for name in problem.names])
    return theta if np.isfinite(problem.objective(theta)) else None


def _nonnegative(basis: np.ndarray, loss: np.ndarray) -> np.ndarray | None:
    """Coefficients of the columns of `basis` that make up the loss, by relative error, none of them 0."""
    scale = basis.mean(axis=0)
    if not np.all(np.isfinite(basis)) or not np.all(scale > 0):
        return None
    found, _ = nnls(basis / scale / loss[:, None], np.ones_like(loss))
    return np.maximum(found, _TINY * loss.mean()) / scale


def _unique(problem: _Problem, starts: list[np.ndarray]) -> list[tuple[np.ndarray, float]]:
    """Where the starts lead."""
    ends = [problem.descend(start) for start in starts]
    return [(theta, value) for theta, value in ends if np.isfinite(value)]


def _bootstrap(
    kind: type[Law], points: Points, theta: np.ndarray, options: FitOptions, generator: np.random.Generator
) -> list[Law]:
    """The law of every resample of the points, followed from the fit."""
    laws = []
    for _ in range(options.resamples):
        chosen = generator.integers(points.count, size=points.count)
        problem = _Problem.of(kind, points.take(chosen), options.delta)
        laws.append(problem.law(problem.descend(theta)[0]))
    return laws


def _tails(confidence: float) -> tuple[float, float]:
    return (1 - confidence) / 2, (1 + confidence) / 2
