"""From a study and a scale to its runs: configurations resolved, FLOPs and parameters compared, nothing trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from sparse_lm.config import ConfigError, closest, to_dict
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.models.counts import count, dense_twin
from sparse_lm.study.study import BASELINE, SCALES, Scale, ScaleName, Study
from sparse_lm.train.restore import tokenizer_of

FALLING = ("cosine", "linear")  # schedules that end low, so that a run read before its end looks worse than it is


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one variant: parameters, FLOPs per token in training, the router's share in them, the ratio to the baseline.

    matched: whether the ratio was asked to be 1, within the study's tolerance.
    """

    parameters: int
    active: int
    flops_per_token: int
    router_flops: int
    flop_ratio: float
    matched: bool
    steps: int


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run. key: of its whole configuration, so that what has changed is another run.

    training: None, or the run whose last checkpoint is evaluated with this experiment, which is all there is to do.
    """

    variant: str
    seed: int
    experiment: Experiment
    key: str
    training: Run | None = None

    @property
    def name(self) -> str:
        """Its folder."""
        return f"{self.variant}-s{self.seed}-{self.key}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """runs: seed by seed, so that a study that is stopped half-way has fewer seeds rather than fewer variants.

    Of each seed those that are trained come first, then those that evaluate them in another way.
    """

    study: Study
    scale: ScaleName
    runs: tuple[Run, ...]
    costs: dict[str, Cost]

    @property
    def variants(self) -> tuple[str, ...]:
        """The baseline first."""
        return (BASELINE, *self.study.variants)

    @property
    def jobs(self) -> tuple[tuple[Run, ...], ...]:
        """Each training with the evaluations that need it: what one process has to do in this order."""
        jobs = {run.name: [run] for run in self.runs if run.training is None}
        for run in self.runs:
            if run.training is not None:
                jobs[run.training.name].append(run)
        return tuple(map(tuple, jobs.values()))


def make_plan(study: Study, scale: str, seeds: int | None = None) -> Plan:
    """The runs of a study. seeds: instead of the scale's.

    Raises `ConfigError` when a variant does not resolve, FLOPs or parameters do not match where the study says that
    they do, or the budget cannot be kept.
    """
    if scale not in SCALES:
        raise ConfigError("scale", scale, closest(scale, SCALES))
    if seeds is not None and seeds < 1:
        raise ConfigError("seeds", seeds, "must be at least 1")
    chosen: Scale = study.scales[scale]
    experiments = {name: _experiment(study, name, chosen.base) for name in (BASELINE, *study.variants)}
    for name, variant in study.variants.items():
        if variant.evaluates is not None:
            check_evaluation(f"study.{study.name}.{name}", experiments[variant.evaluates], experiments[name])
    costs = _costs(study, experiments)
    _check_parameters(study, costs)
    if study.budget == "time":
        for name, one in experiments.items():
            if one.optim.schedule in FALLING:
                raise ConfigError(
                    f"study.{study.name}.{name}.optim.schedule",
                    one.optim.schedule,
                    "falls towards the last step, and budget=time reads runs before it; use constant or rsqrt",
                )
    runs: list[Run] = []
    for seed in range(chosen.seeds if seeds is None else seeds):
        trained: dict[str, Run] = {}
        evaluated = []
        for name, one in experiments.items():
            train = one.train.replace(steps=costs[name].steps)
            seeded = one.replace(seed=seed, data_seed=seed, train=train)
            if name == BASELINE or study.variants[name].evaluates is None:
                trained[name] = Run(name, seed, seeded, config_key(seeded))
            else:
                evaluated.append((name, seeded))
        runs += trained.values()
        for name, seeded in evaluated:
            training = trained[str(study.variants[name].evaluates)]
            runs.append(Run(name, seed, seeded, config_key(seeded, training), training))
    return Plan(study, scale, tuple(runs), costs)


def check_evaluation(key: str, trained: Experiment, evaluated: Experiment) -> None:
    """Raises `ConfigError` when a model that was trained as one experiment cannot be evaluated as another."""
    same = evaluated.replace(model=trained.model, train__eval_batches=trained.train.eval_batches)
    if same != trained:
        changed = [
            field.name
            for field in dataclasses.fields(same)
            if getattr(same, field.name) != getattr(trained, field.name)
        ]
        raise ConfigError(key, ", ".join(changed), "is a matter of training; change model or train.eval_batches only")
    vocab = tokenizer_of(trained.data).vocab_size
    before, after = (count(resolved(one, vocab).model).total for one in (trained, evaluated))
    if before != after:
        raise ConfigError(key, f"{after} parameters", f"were trained as {before}; evaluate with the same, or train it")


def config_key(experiment: Experiment, training: Run | None = None) -> str:
    """Ten hexadecimal digits of the SHA-256 of the whole configuration, and of which training it evaluates."""
    content = to_dict(experiment) | ({} if training is None else {"evaluates": training.key})
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:10]


def _experiment(study: Study, name: str, base: Experiment) -> Experiment:
    try:
        if name == BASELINE:
            return base.replace(model=dense_twin(base.model))
        given, trained = study.variants[name].changes.items(), study.variants[name].evaluates
        changes: dict[str, Any] = {key: value(base) if callable(value) else value for key, value in given}
        return (base if trained is None else _experiment(study, trained, base)).replace(**changes)
    except ConfigError as error:
        raise error.under(f"study.{study.name}.{name}") from None
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"study.{study.name}.{name}", dict(study.variants[name].changes), str(error)) from None


def _costs(study: Study, experiments: dict[str, Experiment]) -> dict[str, Cost]:
    base_flops, base_steps, costs = 0, 0, {}
    trained = {name: variant.evaluates for name, variant in study.variants.items() if variant.evaluates is not None}
    for name, one in experiments.items():
        if name in trained:
            continue
        counts = count(resolved(one, tokenizer_of(one.data).vocab_size).model)
        flops = counts.flops_per_token(one.data.length)
        tokens = one.train.batch_size * one.data.length
        if name == BASELINE:
            base_flops, base_steps = flops * tokens, one.train.steps
        ratio = flops * tokens / base_flops
        steps = max(1, round(base_steps / ratio)) if study.budget == "flops" else one.train.steps
        matched = name == BASELINE or study.variants[name].matched
        cost = Cost(
            counts.total, counts.active, flops, counts.part_flops("router", one.data.length), ratio, matched, steps
        )
        if matched and abs(cost.flop_ratio - 1) > study.flop_tolerance:
            raise ConfigError(
                f"study.{study.name}.{name}",
                f"{flops} FLOPs per token",
                f"are {ratio:.3f} of the baseline's, beyond flop_tolerance={study.flop_tolerance}; change its widths, "
                "or declare it with matched=False",
            )
        costs[name] = cost
    return costs | {name: costs[other] for name, other in trained.items()}


def _check_parameters(study: Study, costs: dict[str, Cost]) -> None:
    for group in study.same_parameters:
        first = costs[group[0]].parameters
        for name in group[1:]:
            ratio = costs[name].parameters / first
            if abs(ratio - 1) > study.flop_tolerance:
                raise ConfigError(
                    f"study.{study.name}.{name}",
                    f"{costs[name].parameters} parameters",
                    f"are {ratio:.3f} of those of {group[0]}, beyond {study.flop_tolerance}; change its experts, or "
                    "take it out of same_parameters",
                )
