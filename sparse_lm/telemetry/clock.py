"""Where the seconds of a run go: throughput over recent steps, time left, and an account that sums to wall time."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Literal, get_args

Kind = Literal["compile", "step", "evaluation", "checkpoint", "data", "other"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclasses.dataclass(frozen=True)
class Account:
    """Seconds spent on each kind of work; `total` is the wall time since the clock started."""

    compile: float
    step: float
    evaluation: float
    checkpoint: float
    data: float
    other: float

    @property
    def total(self) -> float:
        """The sum over all kinds."""
        return sum(dataclasses.astuple(self))

    def shares(self) -> dict[str, float]:
        """Share of the total by kind; all 0 before any time has passed."""
        return {kind: getattr(self, kind) / self.total if self.total else 0.0 for kind in KINDS}


class Clock:
    """Times a run of `total_steps` steps on a monotonic clock (seconds).

    At every moment exactly one kind of work is being charged, `other` unless a `measure` or `pause` is open, so the
    kinds add up to wall time by construction. Throughput covers the last `window` steps and leaves out all time
    under `pause`: compilation and evaluation say nothing about how fast the model trains.
    """

    def __init__(
        self,
        total_steps: int,
        window: int = 50,
        seconds_before: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ):
        """`seconds_before`: how long the run had been going before this process resumed it."""
        if total_steps < 1 or window < 1:
            raise ValueError(f"total_steps={total_steps}, window={window}: both must be at least 1")
        self._total_steps, self._before, self._now = total_steps, seconds_before, now
        self._start = self._mark = now()
        self._spent: dict[str, float] = dict.fromkeys(KINDS, 0.0)
        self._kind: Kind = "other"
        self._pauses = 0
        self._training = 0.0
        # (training seconds at the end of a step, tokens since the start); the oldest entry is the window's left edge.
        self._ends: collections.deque[tuple[float, int]] = collections.deque([(0.0, 0)], maxlen=window + 1)

    def _charge(self) -> None:
        now = self._now()
        elapsed, self._mark = now - self._mark, now
        self._spent[self._kind] += elapsed
        if not self._pauses:
            self._training += elapsed

    @contextlib.contextmanager
    def measure(self, kind: Kind) -> Iterator[None]:
        """Charges the time inside to `kind` and counts it as training. Raises `ValueError` on an unknown kind.

        Blocks nest: an inner block's time is charged to its own kind only.
        """
        if kind not in KINDS:
            raise ValueError(f"clock kind {kind!r} is unknown; known: {', '.join(KINDS)}")
        self._charge()
        outer, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._charge()
            self._kind = outer

    @contextlib.contextmanager
    def pause(self, kind: Kind = "evaluation") -> Iterator[None]:
        """Like `measure`, but the time inside (nested blocks too) does not count towards throughput."""
        with self.measure(kind):
            self._pauses += 1
            try:
                yield
            finally:
                self._charge()
                self._pauses -= 1

    def step_done(self, tokens: int) -> None:
        """Notes that a step of `tokens` tokens has ended. Call it when the step's results have arrived on the host."""
        self._charge()
        self._ends.append((self._training, self._ends[-1][1] + tokens))

    @property
    def seconds(self) -> float:
        """Wall time since the start of the run, earlier processes of a resumed run included."""
        return self._before + self._now() - self._start

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of training time over the window; None before the first step."""
        seconds = self._ends[-1][0] - self._ends[0][0]
        return (self._ends[-1][1] - self._ends[0][1]) / seconds if seconds > 0 else None

    @property
    def step_seconds(self) -> float | None:
        """Mean training seconds of a step over the window; None before the first step."""
        steps = len(self._ends) - 1
        return (self._ends[-1][0] - self._ends[0][0]) / steps if steps else None

    def eta(self, step: int) -> float | None:
        """Seconds until the last step, `step` being done; None before the first step.

        Evaluations and checkpoints still to come are taken to cost the same share as so far; compilation is over.
        """
        if self.step_seconds is None:
            return None
        spent = self.account()
        overhead = spent.total - self._training - spent.compile
        share = max(0.0, overhead) / self._training if self._training > 0 else 0.0
        return max(0, self._total_steps - step) * self.step_seconds * (1 + share)

    def account(self) -> Account:
        """Seconds by kind since this clock started, up to now."""
        self._charge()
        return Account(**self._spent)
