"""The published models of a folder of configurations: what they count beside what is published, and what they need."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from sparse_lm.config import ConfigError, closest, python_file
from sparse_lm.experiment import Experiment, load_experiment
from sparse_lm.mesh import abstract_mesh
from sparse_lm.models.counts import count
from sparse_lm.planning import record
from sparse_lm.planning.chips import parse_topology
from sparse_lm.planning.plan import abstract_state, plan_topology, resolve, trace_step
from sparse_lm.telemetry.format import duration, markdown_table

COLUMNS = ("configuration", "total", "published", "active", "without input table", "published")
NEEDS = (
    "configuration",
    "slice",
    "mesh",
    "state GB",
    "in use GB",
    "estimated GB",
    "fits",
    "executed / model",
    "arithmetic / memory / links",
    "compiled in",
)


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
        return self.name, total, self.total or "-", active, without, self.active or "-"

    def needs(self, found: Mapping[str, Any] | None) -> tuple[str, ...]:
        """What stands under `NEEDS`: of one device of its slice and one step. found: its compiled plan, see `record`.

        Without a plan, or where the compiler gave up, times are estimated.
        """
        values = record.describe(plan_topology(self.experiment, self.topology, False), self.experiment, self.topology)
        values = values if found is None else dict(found)
        compiled, times = values["compiled"], values["roofline"]
        mesh = " x ".join(f"{axis}={size}" for axis, size in values["mesh"].items() if size > 1)
        in_use, how = "-", "estimated"
        if found is not None:
            given_up = "message" in compiled
            in_use = "-" if values["source"] == "estimated" else f"{values['peak'] / 1e9:.1f}"
            how = f"given up: {duration(compiled['seconds'])}" if given_up else duration(compiled["seconds"])
        return (
            self.name,
            self.topology,
            mesh or "1",
            f"{(values['state']['parameters'] + values['state']['optimizer']) / 1e9:.1f}",
            in_use,
            f"{values['estimated_peak'] / 1e9:.1f}",
            "yes" if values["fits"] else "no",
            f"{values['overhead']:.2f}",
            " / ".join(f"{times[part]:.2f}" for part in ("compute", "memory", "communication")) + " s",
            how,
        )

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


def chosen(entries: Sequence[Entry], names: Sequence[str]) -> list[Entry]:
    """The entries with these names, all where there are none. Raises `ConfigError` for a name that no entry has."""
    known = [entry.name for entry in entries]
    for name in names:
        if name not in known:
            raise ConfigError("only", name, closest(name, known))
    return [entry for entry in entries if not names or entry.name in names]


def to_markdown(entries: Sequence[Entry], found: Mapping[str, Mapping[str, Any]]) -> str:
    """Two tables as Markdown: counts beside the published ones, and what each slice needs.

    found: name -> its compiled plan; the others are estimated.
    """
    counts = markdown_table(COLUMNS, [entry.cells() for entry in entries])
    needs = markdown_table(NEEDS, [entry.needs(found.get(entry.name)) for entry in entries])
    return f"{counts}\n\n{needs}\n"


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
