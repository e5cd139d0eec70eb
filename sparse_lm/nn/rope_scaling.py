"""Rotary frequencies stretched for rows longer than those that a model was first trained on."""

from __future__ import annotations

import abc
import dataclasses
import math

import numpy as np

from sparse_lm.config import Config, ConfigError, option


class RopeScaling(Config, abc.ABC):
    """Base of the kinds; a subclass is a frozen dataclass with an attribute `kind`.

    amplitude: multiplies sines and cosines. score_factor: multiplies the scale of the scores.
    """

    kind: str

    @abc.abstractmethod
    def stretched(self, frequency: np.ndarray, base: float) -> np.ndarray:
        """Radians per position of each pair, float64; frequency: base^(-2i / width) of pair i."""

    @property
    def amplitude(self) -> float:
        """See the class."""
        return 1.0

    @property
    def score_factor(self) -> float:
        """See the class."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class Yarn(RopeScaling):
    """YaRN (Peng et al. 2023, 2309.00071, sections 3.2 and 3.4): high frequencies stay, low ones are divided.

    A pair that turns more than beta_fast times in `original_length` positions stays, one that turns less than beta_slow
    times is divided by `factor`, those between are in between, linearly in their number. truncate: their bounds are
    whole numbers (gpt-oss: False). Sines and cosines are multiplied by m(1), with m(x) = 0.1 x ln(factor) + 1.
    DeepSeek-V2 and V3: by m(mscale) / m(mscale_all_dim), and scores by m(mscale_all_dim)^2; None of both is the former.
    """

    kind = "yarn"

    factor: float = option(40.0, ge=1)
    original_length: int = option(4096, ge=1)
    beta_fast: float = option(32.0, gt=0)
    beta_slow: float = option(1.0, gt=0)
    truncate: bool = True
    mscale: float | None = option(None, gt=0)
    mscale_all_dim: float | None = option(None, gt=0)

    def check(self) -> None:
        """Raises `ConfigError` when fields contradict each other."""
        if self.beta_fast <= self.beta_slow:
            raise ConfigError("beta_fast", self.beta_fast, f"must be greater than beta_slow={self.beta_slow}")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ConfigError("mscale", self.mscale, "goes with mscale_all_dim: set both or none")

    def stretched(self, frequency: np.ndarray, base: float) -> np.ndarray:
        """See `RopeScaling.stretched`."""
        half = len(frequency)

        def pair_of(turns: float) -> float:
            return half * math.log(self.original_length / (turns * 2 * math.pi)) / math.log(base)

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        # The upper bound is the width, not its half, in the published code that checkpoints were trained with.
        low, high = max(low, 0), min(high, 2 * half - 1)
        share = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
        return frequency * (1 - share) + frequency / self.factor * share

    @property
    def amplitude(self) -> float:
        """See `RopeScaling`."""
        if self.mscale is None or self.mscale_all_dim is None:
            return self._m(1.0)
        return self._m(self.mscale) / self._m(self.mscale_all_dim)

    @property
    def score_factor(self) -> float:
        """See `RopeScaling`."""
        return 1.0 if self.mscale_all_dim is None else self._m(self.mscale_all_dim) ** 2

    def _m(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.factor) + 1


@dataclasses.dataclass(frozen=True)
class LongRope(RopeScaling):
    """LongRoPE (Ding et al. 2024, 2402.13753): every frequency is divided by a factor of its own, found by search.

    divisors: one per pair of a head. A published model has two lists, for short rows and for long ones: give the one
    that fits the rows. gain: of sines and cosines.
    """

    kind = "longrope"

    divisors: tuple[float, ...] = ()
    gain: float = option(1.0, gt=0)

    def check(self) -> None:
        """Raises `ConfigError` where a divisor is no divisor."""
        if not self.divisors or min(self.divisors) <= 0:
            raise ConfigError("divisors", self.divisors, "must be positive numbers, one per pair of a head")

    def stretched(self, frequency: np.ndarray, base: float) -> np.ndarray:
        """See `RopeScaling.stretched`. Raises `ConfigError` when there are not as many divisors as pairs."""
        if len(self.divisors) != len(frequency):
            raise ConfigError(
                "model.heads.rope_scaling.divisors",
                len(self.divisors),
                f"divisors are given and a head rotates {len(frequency)} pairs; give one per pair",
            )
        return frequency / np.asarray(self.divisors)

    @property
    def amplitude(self) -> float:
        """See `RopeScaling`."""
        return self.gain


@dataclasses.dataclass(frozen=True)
class Llama3(RopeScaling):
    """Llama 3.1 (2407.21783) and 4: as YaRN, with bounds in wavelengths and no amplitude.

    A pair whose wavelength is below original_length / high_freq_factor stays, one above original_length /
    low_freq_factor is divided by `factor`; between, the share that stays is linear in the frequency.
    """

    kind = "llama3"

    factor: float = option(8.0, ge=1)
    low_freq_factor: float = option(1.0, gt=0)
    high_freq_factor: float = option(4.0, gt=0)
    original_length: int = option(8192, ge=1)

    def check(self) -> None:
        """Raises `ConfigError` when the bounds are not in order."""
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                "high_freq_factor",
                self.high_freq_factor,
                f"must be greater than low_freq_factor={self.low_freq_factor}",
            )

    def stretched(self, frequency: np.ndarray, base: float) -> np.ndarray:
        """See `RopeScaling.stretched`."""
        turns = self.original_length * frequency / (2 * math.pi)
        stays = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return frequency * stays + frequency / self.factor * (1 - stays)


ROPE_SCALINGS: dict[str, type[RopeScaling]] = {kind.kind: kind for kind in (Yarn, LongRope, Llama3)}
