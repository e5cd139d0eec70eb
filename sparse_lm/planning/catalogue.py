"""The published models of a folder of configurations: what they count beside what is published, and what they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

import jax

from sparse_lm.config import ConfigError, closest, python_file
from sparse_lm.experiment import Experiment, load_experiment
from sparse_lm.mesh import abstract_mesh
from sparse_lm.models.counts import count
from sparse_lm.planning.chips import parse_topology
from sparse_lm.planning.plan import Plan, abstract_state, plan_topology, resolve, trace_step
from sparse_lm.telemetry.format import markdown_table

COLUMNS = ("configuration", "total", "published", "active", "without input table", "published", "slice")
NEEDS = ("mesh", "GB per device", "source", "fits")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One published model. name: of the file, and the variant after a colon.

    total, active: as published, such as 46.7B; empty where nothing is. topology: the slice to plan for.
    """

    name: str
    experiment: Experiment
    total: str
    active: str
    topology: str

    def counts(self) -> tuple[int, int, int]:
        """Parameters: all, those that a token uses, and the latter without the table that tokens are looked up in.

        Publishers count one or the other. A tied table stays: the output multiplies by it.
        """
        found, model = count(self.experiment.model), self.experiment.model
        return found.total, found.active, found.active - (0 if model.tie_embeddings else found.embedding.active)

    def cells(self) -> tuple[str, ...]:
        """What stands in the `COLUMNS`."""
        total, active, without = (short(number) for number in self.counts())
        return self.name, total, self.total or "-", active, without, self.active or "-", self.topology

    def plan(self, compile_step: bool = False) -> Plan:
        """What its training step needs on its slice: by formulas, or compiled where that is possible."""
        return plan_topology(self.experiment, self.topology, compile_step)

    def lowered(self, platform: str = "tpu") -> jax.stages.Lowered:
        """Its training step as a program for all devices of its slice, before any compiler; nothing is allocated.

        Raises `TypeError` or `ValueError` of jax where the mesh does not suit a layer.
        """
        mesh = abstract_mesh(self.experiment.mesh_sizes(parse_topology(self.topology).size))
        with jax.sharding.use_abstract_mesh(mesh):
            state = abstract_state(self.experiment, mesh)
            return trace_step(self.experiment, state, mesh).lower(lowering_platforms=(platform,))


def catalogue(folder: Path) -> list[Entry]:
    """All variants of all files of a folder, by name.

    A file has beside `get_config` a table `PUBLISHED`: variant (empty where there is one) -> total, active, slice.
    Raises `ConfigError` where it has none, or there is no file.
    """
    found = []
    for path in sorted(folder.glob("*.py")):
        published = getattr(python_file(path), "PUBLISHED", None)
        if not published:
            raise ConfigError(
                "catalogue", str(path), "has no table PUBLISHED; write PUBLISHED = {variant: (total, active, slice)}"
            )
        for variant, (total, active, topology) in published.items():
            experiment = resolve(load_experiment(path, variant or None))
            found.append(Entry(f"{path.stem}:{variant}".rstrip(":"), experiment, total, active, topology))
    if not found:
        raise ConfigError("catalogue", str(folder), "has no configurations; name a folder such as configs/paper")
    return found


def to_markdown(entries: Sequence[Entry], compiled: Collection[str] = ()) -> str:
    """The table as Markdown: counts beside the published ones, and what each slice needs.

    compiled: names of entries whose steps are compiled, which takes minutes each; the others are estimated. Raises
    `ConfigError` for a name that no entry has.
    """
    unknown = set(compiled) - {entry.name for entry in entries}
    if unknown:
        raise ConfigError("compile", min(unknown), closest(min(unknown), [entry.name for entry in entries]))
    lines = []
    for entry in entries:
        plan = entry.plan(entry.name in compiled)
        mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1)
        needs = (mesh or "1", f"{plan.peak / 1e9:.1f}", plan.source, "yes" if plan.fits else "no")
        lines.append((*entry.cells(), *needs))
    return markdown_table((*COLUMNS, *NEEDS), lines) + "\n"


def short(number: int) -> str:
    """1234567890 as 1.235B: four digits, in millions, billions (B) or trillions."""
    unit, size = next(((unit, size) for unit, size in (("T", 1e12), ("B", 1e9)) if number >= size), ("M", 1e6))
    return f"{number / size:#.4g}".rstrip(".") + unit


def published_number(text: str) -> tuple[float, float]:
    """What a text such as 46.7B says, and what its last digit is worth: 46.7e9 and 1e8.

    Raises `ValueError` when it is not a number with M, B or T behind it.
    """
    units = {"M": 1e6, "B": 1e9, "T": 1e12}
    if text[-1:] not in units:
        raise ValueError(f"{text!r} is no published number; write it as 145M, 46.7B or 1.04T")
    digits, unit = text[:-1], units[text[-1]]
    decimals = len(digits.partition(".")[2])
    return float(digits) * unit, unit * 10.0**-decimals
