"""Published scaling laws with the coefficients their authors fitted, and what their variables count.

A law is a frozen dataclass whose fields are its coefficients; its columns name what it is a function of:

- `total`, `active`: all parameters, and those that one token uses; tables of embeddings are counted.
  `total_non_embedding`, `active_non_embedding`: without them. See `sparse_lm.models.counts`.
- `tokens`: trained on, repeated ones included.
- `experts`: how many times the parameters of the feed-forward layers are those that a token uses; with experts of the
  dense layer's width and one of them per token it is the number of experts. 1 is a dense model.
- `granularity`: width of a dense layer over that of an expert.
- `sparsity`: share of the experts that a token does not use, 0 for a dense model.

Losses are nats per token, of the authors' tokenizer and data: coefficients carry over to no other.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from sparse_lm.config import ConfigError, closest

# Column -> (least value, whether the least itself is allowed, greatest value, not allowed itself).
LIMITS: dict[str, tuple[float, bool, float]] = {
    "total": (0.0, False, np.inf),
    "active": (0.0, False, np.inf),
    "total_non_embedding": (0.0, False, np.inf),
    "active_non_embedding": (0.0, False, np.inf),
    "tokens": (0.0, False, np.inf),
    "experts": (1.0, True, np.inf),
    "granularity": (0.0, False, np.inf),
    "sparsity": (0.0, True, 1.0),
    "loss": (0.0, False, np.inf),
}

ROUTING_FLOPS = 14.0  # per router parameter and token, c_r of Krajewski et al. 2024, equation 10
OTHER_FLOPS = 6.0  # per active parameter and token, c_f there
EXPANSION = 64.0  # E of all their experiments
WIDTH_PER_LAYER = 64.0  # d_model / n_blocks, held fixed there (section 6.1) and by Ludziejewski et al. 2025


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """How a coefficient is fitted. low, high: of the random starts. bounds: of the fit; a positive one is a logarithm.

    linear: the loss (or, where `Law.log_linear`, its logarithm) is linear in it, so that starts need not guess it.
    """

    low: float = 0.0
    high: float = 0.0
    positive: bool = True
    linear: bool = False
    bounds: tuple[float, float] = (-np.inf, np.inf)


_LINEAR = Coefficient(linear=True, bounds=(1e-40, 1e80))
# What is left without end may well be 0, which has no logarithm.
_CONSTANT = Coefficient(positive=False, linear=True, bounds=(0.0, np.inf))
_EXPONENT = Coefficient(0.03, 0.8, bounds=(1e-3, 4.0))
# The saturation of Clark et al. is defined for start < max; these ranges keep them apart.
_START = Coefficient(1.0, 6.0, bounds=(1.0, 20.0))
_MAX = Coefficient(64.0, 1000.0, bounds=(20.0, 1e7))


class Law:
    """A loss as a function of columns.

    columns: what it needs. size: the column that is traded against tokens in `optimum`; `fixed` ones are given.
    embeddings: whether the authors count tables of embeddings as parameters; None where this is not established here,
    and columns that count them are taken. log_linear: linear coefficients are those of the logarithm.
    """

    kind: ClassVar[str]
    source: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    embeddings: ClassVar[bool | None]
    log_linear: ClassVar[bool] = False
    coefficients: ClassVar[Mapping[str, Coefficient]]

    @staticmethod
    def formula(c: Any, x: Any) -> np.ndarray:
        """The loss from coefficients `c` and columns `x` by attribute; complex coefficients are allowed."""
        raise NotImplementedError

    def loss(self, **columns: Any) -> np.ndarray:
        """Nats per token. columns: numbers or arrays of one shape. Raises `ConfigError` for missing or extra ones."""
        check_columns(type(self), columns)
        x = types.SimpleNamespace(**{name: np.asarray(value, float) for name, value in columns.items()})
        return np.asarray(type(self).formula(self, x))

    def flops_per_token(self, size: Any, fixed: Mapping[str, float]) -> np.ndarray:
        """Training FLOPs per token of models with `size` parameters (the law's first column), as the authors count.

        Raises `ConfigError` where the law has no trade between size and tokens.
        """
        raise ConfigError(
            "law",
            self.kind,
            "has no term in tokens, so that no budget is best spent; use joint, granularity or another",
        )

    def values(self) -> dict[str, float]:
        """Coefficients by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


def check_columns(law: type[Law], columns: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless `columns` are those of the law."""
    for name in law.columns:
        if name not in columns:
            raise ConfigError(f"columns.{name}", None, f"is missing; the law {law.kind} needs {', '.join(law.columns)}")
    for name in columns:
        if name not in law.columns:
            raise ConfigError(f"columns.{name}", columns[name], closest(name, law.columns))


def saturated(experts: Any, start: Any, most: Any) -> Any:
    """How many experts E are worth: 1/E' = 1/(E - 1 + 1/(1/start - 1/most)) + 1/most; `start` at E = 1, then at most
    `most`. Clark et al. 2022, section 4.2."""
    return 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


@dataclasses.dataclass(frozen=True)
class Chinchilla(Law):
    """L = e + a / N^alpha + b / D^beta (Hoffmann et al. 2022, equation 10). N: all parameters, embeddings counted."""

    e: float
    a: float
    b: float
    alpha: float
    beta: float

    kind: ClassVar[str] = "chinchilla"
    source: ClassVar[str] = "Hoffmann et al. 2022 (2203.15556), approach 3"
    columns: ClassVar[tuple[str, ...]] = ("active", "tokens")
    embeddings: ClassVar[bool | None] = True
    coefficients: ClassVar[Mapping[str, Coefficient]] = {
        "e": _CONSTANT,
        "a": _LINEAR,
        "b": _LINEAR,
        "alpha": _EXPONENT,
        "beta": _EXPONENT,
    }

    @staticmethod
    def formula(c: Any, x: Any) -> np.ndarray:
        """See the class."""
        return c.e + c.a * x.active**-c.alpha + c.b * x.tokens**-c.beta

    def flops_per_token(self, size: Any, fixed: Mapping[str, float]) -> np.ndarray:
        """6 N."""
        return 6 * np.asarray(size, float)


@dataclasses.dataclass(frozen=True)
class Unified(Law):
    """log10 L = a log10 N + b log10 E' + c log10 N log10 E' + d, E' saturated (Clark et al. 2022, equations 1 and 2).

    N: parameters of the dense model, which a token uses; 130B tokens were fixed, so that they are no variable.
    """

    a: float
    b: float
    c: float
    d: float
    e_start: float
    e_max: float

    kind: ClassVar[str] = "unified"
    source: ClassVar[str] = "Clark et al. 2022 (2202.01169), table 3"
    columns: ClassVar[tuple[str, ...]] = ("active", "experts")
    embeddings: ClassVar[bool | None] = None
    log_linear: ClassVar[bool] = True
    coefficients: ClassVar[Mapping[str, Coefficient]] = {
        **dict.fromkeys("abcd", Coefficient(positive=False, linear=True)),
        "e_start": _START,
        "e_max": _MAX,
    }

    @staticmethod
    def formula(c: Any, x: Any) -> np.ndarray:
        """See the class."""
        n, e = np.log10(x.active), np.log10(saturated(x.experts, c.e_start, c.e_max))
        return 10 ** (c.a * n + c.b * e + c.c * n * e + c.d)

    def cutoff(self) -> float:
        """Size N from which on more experts do not help: where the slope in log E' is 0 (section 5.1 there)."""
        return 10 ** (-self.b / self.c)

    def effective_parameters(self, active: float, experts: float) -> float:
        """Parameters of the dense model with the same loss (section 5.1 there)."""
        loss = float(self.loss(active=active, experts=experts))
        start = np.log10(self.e_start)
        return float(10 ** ((np.log10(loss) - self.d - self.b * start) / (self.a + self.c * start)))


@dataclasses.dataclass(frozen=True)
class Granularity(Law):
    """L = c + (g / G^gamma + a) / N^alpha + b / D^beta (Krajewski et al. 2024, equation 9), at a fixed expansion.

    N: all parameters without embeddings and routers, d^2 (8 E + 4) n of n blocks of width d with expansion E.
    """

    c: float
    g: float
    a: float
    b: float
    alpha: float
    beta: float
    gamma: float

    kind: ClassVar[str] = "granularity"
    source: ClassVar[str] = "Krajewski et al. 2024 (2402.07871), table 1"
    columns: ClassVar[tuple[str, ...]] = ("total_non_embedding", "tokens", "granularity")
    embeddings: ClassVar[bool | None] = False
    coefficients: ClassVar[Mapping[str, Coefficient]] = {
        "c": _CONSTANT,
        **dict.fromkeys("gab", _LINEAR),
        "alpha": _EXPONENT,
        "beta": _EXPONENT,
        "gamma": Coefficient(0.1, 1.5, bounds=(1e-2, 6.0)),
    }

    @staticmethod
    def formula(c: Any, x: Any) -> np.ndarray:
        """See the class."""
        size = (c.g * x.granularity**-c.gamma + c.a) * x.total_non_embedding**-c.alpha
        return c.c + size + c.b * x.tokens**-c.beta

    def flops_per_token(self, size: Any, fixed: Mapping[str, float]) -> np.ndarray:
        """(12 d^2 c_f + d E G c_r) n with d = 64 n (equation 10 there). fixed: granularity, experts E, else 64."""
        expansion = fixed.get("experts", EXPANSION)
        width = (WIDTH_PER_LAYER * np.asarray(size, float) / (8 * expansion + 4)) ** (1 / 3)
        router = width * expansion * fixed["granularity"] * ROUTING_FLOPS
        return (12 * width**2 * OTHER_FLOPS + router) * width / WIDTH_PER_LAYER


@dataclasses.dataclass(frozen=True)
class Joint(Law):
    """L = a E'^delta N^(alpha + gamma ln E') + b E'^omega D^(beta + zeta ln E') + c, E' saturated.

    Ludziejewski et al. 2025, equation 6. N: parameters that a token uses, embedding and unembedding counted. One expert
    of the dense layer's width per token. For each number of experts it is a law of Hoffmann et al., see `at`.
    """

    a: float
    alpha: float
    delta: float
    gamma: float
    b: float
    beta: float
    omega: float
    zeta: float
    e_start: float
    e_max: float
    c: float

    kind: ClassVar[str] = "joint"
    source: ClassVar[str] = "Ludziejewski et al. 2025 (2502.05172), table 3"
    columns: ClassVar[tuple[str, ...]] = ("active", "tokens", "experts")
    embeddings: ClassVar[bool | None] = True
    coefficients: ClassVar[Mapping[str, Coefficient]] = {
        "a": _LINEAR,
        "alpha": Coefficient(-0.5, -0.03, positive=False),
        "delta": Coefficient(-0.8, 0.8, positive=False),
        "gamma": Coefficient(-0.04, 0.04, positive=False),
        "b": _LINEAR,
        "beta": Coefficient(-0.5, -0.03, positive=False),
        "omega": Coefficient(-0.8, 0.8, positive=False),
        "zeta": Coefficient(-0.04, 0.04, positive=False),
        "e_start": _START,
        "e_max": _MAX,
        "c": _CONSTANT,
    }

    @staticmethod
    def formula(c: Any, x: Any) -> np.ndarray:
        """See the class."""
        e = np.log(saturated(x.experts, c.e_start, c.e_max))
        n, d = np.log(x.active), np.log(x.tokens)
        size, data = c.delta * e + (c.alpha + c.gamma * e) * n, c.omega * e + (c.beta + c.zeta * e) * d
        return c.a * np.exp(size) + c.b * np.exp(data) + c.c

    def flops_per_token(self, size: Any, fixed: Mapping[str, float]) -> np.ndarray:
        """6 N."""
        return 6 * np.asarray(size, float)

    def at(self, experts: float) -> Chinchilla:
        """The law of Hoffmann et al. that this is for a fixed number of experts (table 4 there)."""
        e = float(np.log(saturated(experts, self.e_start, self.e_max)))
        a, b = self.a * float(np.exp(self.delta * e)), self.b * float(np.exp(self.omega * e))
        return Chinchilla(self.c, a, b, -(self.alpha + self.gamma * e), -(self.beta + self.zeta * e))


@dataclasses.dataclass(frozen=True)
class Sparsity(Law):
    """L = a / N^alpha + b / D^beta + c / (1 - S)^lam + d / ((1 - S)^delta N^gamma) + e (Abnar et al. 2025, equation 6).

    N: all parameters, of which the share S of the experts' is not used by a token.
    """

    a: float
    b: float
    c: float
    d: float
    e: float
    alpha: float
    beta: float
    lam: float
    delta: float
    gamma: float

    kind: ClassVar[str] = "sparsity"
    source: ClassVar[str] = "Abnar et al. 2025 (2501.12370), table 3"
    columns: ClassVar[tuple[str, ...]] = ("total", "tokens", "sparsity")
    embeddings: ClassVar[bool | None] = None
    coefficients: ClassVar[Mapping[str, Coefficient]] = {
        **dict.fromkeys("abcd", _LINEAR),
        "e": _CONSTANT,
        "alpha": _EXPONENT,
        "beta": _EXPONENT,
        "lam": Coefficient(-0.6, 0.6, positive=False),
        "delta": Coefficient(-0.6, 0.6, positive=False),
        "gamma": _EXPONENT,
    }

    @staticmethod
    def formula(c: Any, x: Any) -> np.ndarray:
        """See the class."""
        used = 1 - x.sparsity
        both = c.d * used**-c.delta * x.total**-c.gamma
        return c.a * x.total**-c.alpha + c.b * x.tokens**-c.beta + c.c * used**-c.lam + both + c.e

    def flops_per_token(self, size: Any, fixed: Mapping[str, float]) -> np.ndarray:
        """6 N (1 - S): as if all parameters were experts'. fixed: sparsity."""
        return 6 * np.asarray(size, float) * (1 - fixed["sparsity"])
