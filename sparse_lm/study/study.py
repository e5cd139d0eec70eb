"""A study as its file in configs/ablations/ writes it down, checked before anything runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sparse_lm.config import ConfigError, closest, python_file
from sparse_lm.experiment import Experiment
from sparse_lm.study.claims import Claim

ScaleName = Literal["toy", "small", "paper"]
SCALES: tuple[ScaleName, ...] = ("toy", "small", "paper")
Budget = Literal["steps", "flops", "time"]
BASELINE = "dense"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the claims come from. arxiv: its number. table: table, figure or section."""

    paper: str
    arxiv: str
    table: str


@dataclasses.dataclass(frozen=True)
class Scale:
    """base: the experiment that variants change. seeds: how many, from 0 on."""

    base: Experiment
    seeds: int


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    changes: of the base experiment, see `Config.replace`; a function gets the base experiment and returns the value,
        for what depends on the scale. paper: the paper's number for it, in the study's `unit`.
    matched: its FLOPs per token must be the baseline's; False where what is compared is not at equal FLOPs.
    evaluates: another variant, whose training this one shares: the changes are of that variant's experiment, and all
        that is done is to evaluate its last checkpoint with them. They may concern the model, not its parameters, and
        how much is evaluated. Costs, and whether they are matched, are that variant's.
    """

    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paper: float | None = None
    matched: bool = True
    evaluates: str | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """A question to a paper's table.

    variants: by name. claims: what the paper says of them; they may also speak of the baseline, `dense`, the twin of
        the base experiment with the same FLOPs per token, which every study runs. baseline_paper: its number there.
    budget: what variants have in common: `steps` (the base's), `flops` (as many steps as the baseline's FLOPs are good
        for), or `time` (all train for the base's steps, and are read at the training time that the fastest one took;
        that needs a learning rate that does not fall towards the last step).
    flop_tolerance: how far FLOPs per token, the router's included, may be from the baseline's, as a share of them.
    same_parameters: groups of variants that must have equally many parameters, within the same tolerance.
    unit: of the paper's numbers, and which way is better.
    """

    name: str
    question: str
    source: Source
    scales: Mapping[ScaleName, Scale]
    variants: Mapping[str, Variant]
    claims: tuple[Claim, ...]
    unit: str = ""
    budget: Budget = "steps"
    baseline_paper: float | None = None
    flop_tolerance: float = 0.05
    same_parameters: tuple[tuple[str, ...], ...] = ()
    notes: str = ""

    def __post_init__(self):
        """Raises `ConfigError` on names that clash, or that claims use and nobody has defined."""
        for name in (self.name, *self.variants):
            if not _NAME.fullmatch(name) or name == BASELINE:
                raise ConfigError("study.variants", name, f"use letters, digits and _.+-, and not {BASELINE!r}")
        known = (BASELINE, *self.variants)
        spoken = [(f"study.claims[{c.name}]", name) for c in self.claims for name in c.variants()]
        spoken += [("study.same_parameters", name) for group in self.same_parameters for name in group]
        for key, name in spoken:
            if name not in known:
                raise ConfigError(key, name, f"is no variant; {closest(name, known)}")
        self._check_evaluations()
        names = [claim.name for claim in self.claims]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("study.claims", name, "two claims have this name; rename one")
        if set(self.scales) != set(SCALES):
            raise ConfigError("study.scales", sorted(self.scales), f"a study has the scales {', '.join(SCALES)}")
        if not 0 < self.flop_tolerance < 1:
            raise ConfigError("study.flop_tolerance", self.flop_tolerance, "is a share: choose it between 0 and 1")
        object.__setattr__(self, "variants", MappingProxyType(dict(self.variants)))

    def smaller(self, *variants: str, **changes: Any) -> Study:
        """The study of these variants alone, for a first look: claims that speak of others are left out.

        changes: of the base experiment at every scale, see `Config.replace`. Raises `ConfigError` on an unknown name.
        """
        for name in variants:
            if name not in self.variants:
                raise ConfigError("study.variants", name, f"is no variant; {closest(name, self.variants)}")
        known = {BASELINE, *variants}
        groups = (tuple(name for name in group if name in known) for group in self.same_parameters)
        return dataclasses.replace(
            self,
            variants={name: variant for name, variant in self.variants.items() if name in known},
            claims=tuple(claim for claim in self.claims if known.issuperset(claim.variants())),
            scales={
                name: dataclasses.replace(scale, base=scale.base.replace(**changes))
                for name, scale in self.scales.items()
            },
            same_parameters=tuple(group for group in groups if len(group) > 1),
        )

    def _check_evaluations(self) -> None:
        trained = [BASELINE, *(name for name, one in self.variants.items() if one.evaluates is None)]
        for name, one in self.variants.items():
            key = f"study.{self.name}.{name}.evaluates"
            if one.evaluates is not None and one.evaluates not in trained:
                raise ConfigError(
                    key, one.evaluates, f"is no variant that is trained; {closest(one.evaluates, trained)}"
                )
            if one.evaluates is not None and self.budget == "time":
                raise ConfigError(
                    key, one.evaluates, "has no loss at an earlier time, which budget=time reads; train it"
                )

    @property
    def measure(self) -> str:
        """The measure that claims are about unless they name another."""
        return "loss_at_equal_time" if self.budget == "time" else "validation_loss"


def load_study(path: Path) -> Study:
    """The `STUDY` of a Python file. Raises `ConfigError` when there is no file or no study in it."""
    if not path.is_file():
        raise ConfigError("study", str(path), "there is no such file; those that there are: configs/ablations/*.py")
    module = python_file(path)
    if module is None:
        raise ConfigError("study", str(path), "is no Python file; name one of configs/ablations/")
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise ConfigError("study", str(path), "defines no STUDY = Study(...); see configs/ablations/experts.py")
    return study
