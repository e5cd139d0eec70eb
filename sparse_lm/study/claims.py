"""What a paper says about its variants, as predicates on results: shown, contradicted, or not shown.

Every claim comes down to comparisons: that a difference a - b of two variants (or the value of one) lies in an open
range. A comparison is shown when the whole interval over seeds lies in the range, contradicted when all of it lies
outside, and not shown otherwise. A claim is shown when all of its comparisons are, and contradicted when any is.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from sparse_lm.study import stats

Verdict = Literal["shown", "contradicted", "not shown"]
Values = Mapping[str, Mapping[str, Mapping[int, float]]]  # measure -> variant -> seed -> value


@dataclasses.dataclass(frozen=True)
class Comparison:
    """That a - b (or a alone, without b) lies between `low` and `high`, both excluded."""

    a: str
    b: str | None
    low: float = -math.inf
    high: float = math.inf

    def words(self) -> str:
        """The comparison as a formula."""
        left = self.a if self.b is None else f"{self.a} - {self.b}"
        parts = [f"{self.low:g} < "] if math.isfinite(self.low) else []
        return "".join([*parts, left, f" < {self.high:g}" if math.isfinite(self.high) else ""])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Claim(abc.ABC):
    """name: in a few words. statement: what the paper says. measure: None is the study's own (a loss)."""

    name: str
    statement: str
    measure: str | None = None

    @abc.abstractmethod
    def comparisons(self) -> tuple[Comparison, ...]:
        """What has to hold."""

    def variants(self) -> tuple[str, ...]:
        """The variants that it speaks of, each once."""
        names = [name for one in self.comparisons() for name in (one.a, one.b) if name is not None]
        return tuple(dict.fromkeys(names))


@dataclasses.dataclass(frozen=True)
class Less(Claim):
    """a is lower than b, by more than `by`."""

    a: str
    b: str
    by: float = dataclasses.field(default=0.0, kw_only=True)

    def comparisons(self) -> tuple[Comparison, ...]:
        """a - b < -by."""
        return (Comparison(self.a, self.b, high=0.0 - self.by),)


@dataclasses.dataclass(frozen=True)
class Monotone(Claim):
    """Each of `order` is lower than the one before."""

    order: tuple[str, ...]

    def comparisons(self) -> tuple[Comparison, ...]:
        """One for each pair of neighbours."""
        return tuple(
            Comparison(after, before, high=0.0) for before, after in zip(self.order, self.order[1:], strict=False)
        )


@dataclasses.dataclass(frozen=True)
class Within(Claim):
    """a and b differ by less than `margin`: a claim of equality, which needs enough seeds to be shown."""

    a: str
    b: str
    margin: float

    def comparisons(self) -> tuple[Comparison, ...]:
        """-margin < a - b < margin."""
        return (Comparison(self.a, self.b, -self.margin, self.margin),)


@dataclasses.dataclass(frozen=True)
class Between(Claim):
    """The value of a variant lies between two numbers; either may be left out."""

    a: str
    low: float = -math.inf
    high: float = math.inf

    def comparisons(self) -> tuple[Comparison, ...]:
        """low < a < high."""
        return (Comparison(self.a, None, self.low, self.high),)


@dataclasses.dataclass(frozen=True)
class Compared:
    """A comparison with what was measured: paired differences by seed and their statistics (None without two)."""

    comparison: Comparison
    differences: tuple[float, ...]
    verdict: Verdict
    interval: stats.Interval | None
    t_interval: stats.Interval | None
    smallest_detectable: float | None
    luck: float


@dataclasses.dataclass(frozen=True)
class Judged:
    """A claim with its verdict and what that rests on."""

    claim: Claim
    measure: str
    verdict: Verdict
    compared: tuple[Compared, ...]


def judge(claim: Claim, values: Values, measure: str) -> Judged:
    """The verdict on a claim. measure: the study's own. Seeds that not both variants have finished are left out."""
    measure = claim.measure or measure
    compared = tuple(compare(one, values.get(measure, {})) for one in claim.comparisons())
    verdicts = {one.verdict for one in compared}
    verdict: Verdict = "not shown"
    if "contradicted" in verdicts:
        verdict = "contradicted"
    elif verdicts == {"shown"}:
        verdict = "shown"
    return Judged(claim, measure, verdict, compared)


def compare(comparison: Comparison, values: Mapping[str, Mapping[int, float]]) -> Compared:
    """One comparison. values: variant -> seed -> value of the measure."""
    left = values.get(comparison.a, {})
    right = dict.fromkeys(left, 0.0) if comparison.b is None else values.get(comparison.b, {})
    differences = tuple(left[seed] - right[seed] for seed in sorted(left.keys() & right.keys()))
    chance = stats.luck(len(differences))
    if len(differences) < 2:
        return Compared(comparison, differences, "not shown", None, None, None, chance)
    interval = stats.bootstrap_interval(differences)
    return Compared(
        comparison,
        differences,
        _verdict(comparison, interval),
        interval,
        stats.t_interval(differences),
        stats.smallest_detectable(differences),
        chance,
    )


def _verdict(comparison: Comparison, interval: stats.Interval) -> Verdict:
    if comparison.low < interval.low and interval.high < comparison.high:
        return "shown"
    # Equality with an end, as of two runs that are the same, speaks for neither side.
    beyond = interval.low > comparison.high or interval.high < comparison.low
    return "contradicted" if beyond else "not shown"
