"""Ladders: which runs to train so that a law can be fitted to them. Sizes x experts x budgets of training FLOPs.

Every run of a rung has the rung's FLOPs, by the conventions of `sparse_lm.models.counts` (the router's included): a
larger model trains for fewer steps. What would train too briefly to mean anything, or too long, is left out and named.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparse_lm.config import ConfigError, python_file
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.models.counts import count
from sparse_lm.telemetry.format import compact
from sparse_lm.train.restore import tokenizer_of


@dataclasses.dataclass(frozen=True)
class Size:
    """The dense shape of a model. d_ff: width of its dense layers, and of all experts of a token together."""

    num_layers: int
    d_model: int
    num_heads: int
    d_ff: int


@dataclasses.dataclass(frozen=True)
class Ladder:
    """base: what all runs share: data, optimizer, batch, router.

    experts: how many times a sparse layer's parameters are those that a token uses; 1 is dense. budgets: training FLOPs
    of a run, one rung each. granularity: G, each token goes to G of experts * G experts of d_ff / G.
    min_steps, max_steps: runs outside are left out. The warmup keeps its share of the base's steps.
    """

    base: Experiment
    sizes: tuple[Size, ...]
    experts: tuple[int, ...]
    budgets: tuple[float, ...]
    granularity: int = 1
    min_steps: int = 100
    max_steps: int = 1_000_000

    def __post_init__(self):
        """Raises `ConfigError` for a ladder without runs or with numbers that make none."""
        for name in ("sizes", "experts", "budgets"):
            if not getattr(self, name):
                raise ConfigError(f"ladder.{name}", (), "is empty; a ladder needs at least one")
        for name in ("experts", "budgets"):
            for i, value in enumerate(getattr(self, name)):
                if not (math.isfinite(value) and value >= 1):
                    raise ConfigError(f"ladder.{name}[{i}]", value, "must be at least 1 and finite")
        if self.granularity < 1:
            raise ConfigError("ladder.granularity", self.granularity, "must be at least 1")
        if self.base.model.moe is None and max(self.experts) > 1:
            raise ConfigError("ladder.base.model.moe", None, "is dense; give a base with experts, or experts=(1,)")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ConfigError("ladder.min_steps", self.min_steps, f"must be from 1 to max_steps={self.max_steps}")


@dataclasses.dataclass(frozen=True)
class Rung:
    """One run. changes: of the base experiment, as `Config.replace` takes them. flops: of the whole training.

    columns: what laws are fitted to, without the loss.
    """

    name: str
    budget: float
    changes: Mapping[str, Any]
    experiment: Experiment
    flops: float
    columns: Mapping[str, float]

    def flags(self) -> list[str]:
        """The changes as flags of experiments/train.py."""
        return [f"--config.{key.replace('__', '.')}={value}" for key, value in self.changes.items()]


@dataclasses.dataclass(frozen=True)
class LadderPlan:
    """rungs: the runs, smallest budgets first. left_out: names of the others, with how many steps they would have."""

    rungs: tuple[Rung, ...]
    left_out: Mapping[str, float]

    def changes(self) -> dict[str, Mapping[str, Any]]:
        """By name; each makes a variant of a study: `Variant(changes, matched=False)`."""
        return {rung.name: rung.changes for rung in self.rungs}


def plan_ladder(ladder: Ladder) -> LadderPlan:
    """All runs of a ladder, checked. Raises `ConfigError` when one does not resolve, or when none is left."""
    found, left_out = [], {}
    for budget in sorted(ladder.budgets):
        for size in ladder.sizes:
            for experts in ladder.experts:
                name = f"f{budget:.3g}-l{size.num_layers}d{size.d_model}h{size.d_ff}-e{experts}"
                name += f"-g{ladder.granularity}" if ladder.granularity > 1 and experts > 1 else ""
                try:
                    rung, steps = _rung(ladder, name, budget, size, experts)
                except ConfigError as error:
                    raise error.under(f"ladder.{name}") from None
                if rung is None:
                    left_out[name] = steps
                else:
                    found.append(rung)
    if not found:
        raise ConfigError(
            "ladder.budgets",
            ladder.budgets,
            f"gives every run less than min_steps={ladder.min_steps} or more than max_steps={ladder.max_steps}: "
            f"{', '.join(f'{name} {steps:.3g}' for name, steps in list(left_out.items())[:3])}",
        )
    names = [rung.name for rung in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError("ladder", name, "two runs have this name; make sizes, experts and budgets differ")
    return LadderPlan(tuple(found), left_out)


def _rung(ladder: Ladder, name: str, budget: float, size: Size, experts: int) -> tuple[Rung | None, float]:
    """The run, or None outside of the bounds on steps; and its steps before rounding."""
    base = ladder.base
    changes: dict[str, Any] = {f"model__{key}": value for key, value in dataclasses.asdict(size).items()}
    if experts == 1:
        changes["model__moe"] = None
    else:
        if size.d_ff % ladder.granularity:
            raise ConfigError("d_ff", size.d_ff, f"must be a multiple of granularity={ladder.granularity}")
        changes |= {
            "model__moe__num_experts": experts * ladder.granularity,
            "model__moe__top_k": ladder.granularity,
            "model__moe__d_expert": size.d_ff // ladder.granularity,
        }
    sized = base.replace(**changes)
    counts = count(resolved(sized, tokenizer_of(base.data).vocab_size).model)
    per_step = counts.flops_per_token(base.data.length) * base.train.batch_size * base.data.length
    wanted = budget / per_step
    steps = round(wanted)
    if not ladder.min_steps <= wanted <= ladder.max_steps:
        return None, wanted
    changes |= {
        "train__steps": steps,
        "train__eval_every": max(1, steps // 4),
        "checkpoint__every": steps,
        "optim__warmup_steps": round(base.optim.warmup_steps * steps / base.train.steps),
    }
    columns = {
        "total": float(counts.total),
        "active": float(counts.active),
        "total_non_embedding": float(counts.non_embedding),
        "active_non_embedding": float(counts.active_non_embedding),
        "tokens": float(steps * base.train.batch_size * base.data.length),
        "experts": float(experts),
        "granularity": float(ladder.granularity if experts > 1 else 1),
        "sparsity": 1 - 1 / experts,
    }
    return Rung(name, budget, changes, base.replace(**changes), float(steps * per_step), columns), wanted


def describe(plan: LadderPlan) -> str:
    """Every run as text: its numbers, and below them its flags for experiments/train.py."""
    lines = []
    for rung in plan.rungs:
        numbers = ", ".join(f"{name} {compact(rung.columns[name])}" for name in ("active", "total", "tokens"))
        lines += [f"{rung.name}: {rung.flops:.4g} FLOPs, {numbers}", f"    {' '.join(rung.flags())}"]
    if plan.left_out:
        shown = ", ".join(f"{name} ({compact(steps)})" for name, steps in plan.left_out.items())
        lines.append(f"left out for their number of steps: {shown}")
    return "\n".join(lines)


def load_ladder(path: Path) -> Ladder:
    """The `LADDER` of a Python file. Raises `ConfigError` when there is no file or no ladder in it."""
    module = python_file(path)
    if module is None:
        raise ConfigError("ladder", str(path), "there is no such Python file; the one that there is: configs/ladder.py")
    ladder = getattr(module, "LADDER", None)
    if not isinstance(ladder, Ladder):
        raise ConfigError("ladder", str(path), "defines no LADDER = Ladder(...); see configs/ladder.py")
    return ladder
