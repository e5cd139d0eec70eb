"""The nearest change that makes a step fit its devices: found by trying, first by formulas, then by the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from sparse_lm.config import ConfigError
from sparse_lm.experiment import Experiment
from sparse_lm.planning.describe import binary
from sparse_lm.planning.plan import Plan

Planner = Callable[[Experiment, bool], Plan]  # (resolved experiment, whether to compile) -> its plan
Changes = dict[str, Any]  # dotted key of the configuration -> value
LOSS_CHUNK = 1024  # tokens


@dataclasses.dataclass(frozen=True)
class Advice:
    """changes: dotted keys with their values, or None when nothing that was tried fits; then `plan` is the smallest.

    plan: with the changes. tried: how many changes were estimated. compiled: how many of them were compiled.
    """

    changes: Changes | None
    plan: Plan | None
    tried: int
    compiled: int

    def text(self) -> str:
        """What to do, in one line or two."""
        how = f"{self.tried} changes estimated, {self.compiled} compiled"
        if self.changes is None or self.plan is None:
            least = f"; the smallest needs {binary(self.plan.peak)} per device" if self.plan else ""
            return f"no change that was tried fits{least} ({how}): take more devices, or a smaller model"
        flags = " ".join(f"--config.{key}={value}" for key, value in self.changes.items())
        return (
            f"the nearest change that fits: {flags}\n  {binary(self.plan.peak)} per device, {self.plan.source} ({how})"
        )


def advise(experiment: Experiment, plan: Plan, planner: Planner, compile_at_most: int = 2) -> Advice:
    """Looks for the nearest change of a resolved experiment that fits the chip of its plan, which does not.

    Estimates are scaled by what the compiler found over what the formulas said, where both are known. Where `planner`
    can compile, what should fit is compiled, at most `compile_at_most` times; what then fits is the advice.
    """
    scale = plan.peak / plan.estimated_peak if plan.source == "compiled" else 1.0
    devices, room, tried, compiled = _size(plan), plan.chip.hbm if plan.chip else 0, 0, 0
    smallest: Plan | None = None
    for changes in candidates(experiment, plan.mesh):
        try:
            changed = experiment.replace(**{key.replace(".", "__"): value for key, value in changes.items()})
            changed.mesh_sizes(devices)
            guess = planner(changed, False)
        except ConfigError:
            continue
        tried += 1
        smallest = guess if smallest is None or guess.peak < smallest.peak else smallest
        if guess.peak * scale > room:
            continue
        if plan.source == "estimated" or compiled >= compile_at_most:
            return Advice(changes, guess, tried, compiled)
        compiled += 1
        real = planner(changed, True)
        if real.fits:
            return Advice(changes, real, tried, compiled)
        scale = max(scale, real.peak / real.estimated_peak)
    return Advice(None, smallest, tried, compiled)


def candidates(experiment: Experiment, mesh: dict[str, int]) -> Iterator[Changes]:
    """Changes from near to far: the same arithmetic in other portions, then more of it, then another mesh."""
    model, accumulate = experiment.model, experiment.train.accumulate
    small = list(_smaller_pieces(experiment))
    yield from small
    all_small: Changes = {key: value for changes in small for key, value in changes.items()}
    if len(small) > 1:
        yield all_small
    more = [{"train.accumulate": accumulate * times} for times in (2, 4, 8, 16)]
    remat: Changes = {} if model.remat == "full" else {"model.remat": "full"}
    meshes: list[Changes] = [{}]
    if mesh["data"] > 1:
        meshes.append({"mesh.data": 1, "mesh.fsdp": mesh["data"] * mesh["fsdp"]})
    for cut in (2, 4, 8):
        if mesh["fsdp"] % cut == 0:
            meshes.append(
                {"mesh.fsdp": mesh["fsdp"] // cut, "mesh.model": mesh["model"] * cut, "mesh.data": mesh["data"]}
            )
    for other in meshes:
        for again in [{}, remat] if remat else [{}]:
            for portions in [{}, *more]:
                changes = {**other, **again, **portions}
                if changes:
                    yield changes
                    if all_small:
                        yield {**changes, **all_small}


def _smaller_pieces(experiment: Experiment) -> Iterator[Changes]:
    """Of what is done in pieces anyway, smaller ones."""
    model, moe = experiment.model, experiment.model.moe
    if model.loss_chunk is None:
        yield {"model.loss_chunk": LOSS_CHUNK}
    if moe is not None and moe.exchanges_ragged and moe.exchange_room > 1:
        yield {"model.moe.exchange_room": 1.0}


def _size(plan: Plan) -> int:
    size = 1
    for axis in plan.mesh.values():
        size *= axis
    return size
