"""What a run will need, before it runs: parameters, bytes per device, communication and FLOPs of its train step.

Nothing is trained, nothing is allocated and no data are read. The train step that is compiled here is the one that
training compiles, for devices that are there, for virtual ones, or for a TPU slice that is only described. Where
nothing can be compiled, `planning.estimate` stands in, and the plan says so.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from sparse_lm.batch import Batch
from sparse_lm.config import ConfigError
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.mesh import abstract_mesh, make_mesh
from sparse_lm.models.counts import count
from sparse_lm.moe.dispatch.ragged_all_to_all import FURTHER
from sparse_lm.optim.build import build_optimizer
from sparse_lm.planning.chips import Chip, cannot_compile, chip_of, described_devices, parse_topology
from sparse_lm.planning.collectives import Collective, collectives
from sparse_lm.planning.estimate import Estimate, estimate, filled
from sparse_lm.planning.hlo import parse
from sparse_lm.planning.roofline import Roofline, roofline
from sparse_lm.planning.work import Buffer, Work, largest, work
from sparse_lm.train.restore import tokenizer_of
from sparse_lm.train.state import TrainState, state_shapes
from sparse_lm.train.step import make_train_step

LARGEST = 40  # arrays that a plan remembers


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes on one device. gradients: as large as the parameters, and cut like them; they live within a step only."""

    parameters: int
    optimizer: int
    gradients: int

    @property
    def kept(self) -> int:
        """Bytes between two steps."""
        return self.parameters + self.optimizer


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says about the train step; all of it is of one device.

    arguments: state, batch and key. outputs: new state and metrics. aliased: of the outputs, what takes the place of
    arguments, because the state is donated. temporaries: everything in between: activations, gradients, buffers.
    assigned: bytes of main memory that the assignment of buffers takes at once, None where the compiler does not say.
    work, collectives, largest: from the text of the compiled program, loops counted by their iterations. seconds: of
    trace and compilation, or of loading it from a cache.
    """

    seconds: float
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    assigned: int | None
    work: Work
    collectives: tuple[Collective, ...]
    largest: tuple[Buffer, ...]

    @property
    def total(self) -> int:
        """Bytes of all of it: a bound, since temporaries of a TPU count buffers that share their place."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def peak(self) -> int:
        """Bytes in use at once, as they are assigned, or else the bound."""
        return self.total if self.assigned is None else self.assigned


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """The compiler gave up. needed: bytes of a device that it would have needed, None where it does not say.

    message: its own words, which name the largest arrays.
    """

    seconds: float
    needed: int | None
    message: str


@dataclasses.dataclass(frozen=True)
class PartRow:
    """One line of the table of parameters; `flops` are training FLOPs per token."""

    name: str
    total: int
    active: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the module. model_flops: of one step over all devices, by the conventions of `models.counts`.

    chip: what is known of the device, None where nothing is. compiled: the compiled step; or why there is none: that it
    is too large for a device, in words that it could not be tried, or None when it was not asked for.
    """

    mesh: dict[str, int]
    device_kind: str
    chip: Chip | None
    tokens_per_step: int
    model_flops: int
    parts: tuple[PartRow, ...]
    state: StateBytes
    estimate: Estimate
    compiled: CompiledStep | OutOfMemory | str | None

    @property
    def step(self) -> CompiledStep | None:
        """The compiled step if there is one."""
        return self.compiled if isinstance(self.compiled, CompiledStep) else None

    @property
    def source(self) -> str:
        """Where `peak` comes from: `compiled` or `estimated`."""
        told = isinstance(self.compiled, OutOfMemory) and self.compiled.needed is not None
        return "compiled" if self.step or told else "estimated"

    @property
    def estimated_peak(self) -> int:
        """The bytes of a device by formulas alone."""
        return self.state.kept + self.state.gradients + self.estimate.activations + self.estimate.working

    @property
    def peak(self) -> int:
        """Bytes of a device that are in use at once, at most."""
        if isinstance(self.compiled, OutOfMemory) and self.compiled.needed is not None:
            return self.compiled.needed
        return self.step.peak if self.step else self.estimated_peak

    @property
    def fits(self) -> bool | None:
        """Whether a device has that much memory; None where it is not known."""
        if isinstance(self.compiled, OutOfMemory):
            return False
        return None if self.chip is None else self.peak <= self.chip.hbm

    @property
    def flops(self) -> int:
        """Executed by one device in a step."""
        return self.step.work.flops if self.step else self.estimate.flops

    @property
    def overhead(self) -> float:
        """Executed FLOPs over those of the model."""
        return self.flops * math.prod(self.mesh.values()) / self.model_flops

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """What the devices exchange in a step."""
        return self.step.collectives if self.step else self.estimate.collectives

    @property
    def roofline(self) -> Roofline | None:
        """What the step takes at least, where the chip is known."""
        if self.chip is None:
            return None
        flops = (self.flops, self.model_flops / math.prod(self.mesh.values()))
        moved = self.step.work.memory_bytes if self.step else self.estimate.memory_bytes
        return roofline(self.chip, self.mesh, flops, moved, self.collectives)

    def to_json(self) -> dict[str, Any]:
        """Every number of the plan, ready for `json.dump`."""
        found, values = self.roofline, dataclasses.asdict(self)
        values |= {"peak": self.peak, "source": self.source, "fits": self.fits, "overhead": self.overhead}
        values["estimated_peak"] = self.estimated_peak
        if found is not None:
            bounds = {name: getattr(found, name) for name in ("overlapped", "serial", "bound", "utilisation")}
            values["roofline"] = {**dataclasses.asdict(found), **bounds}
        return values


def resolve(experiment: Experiment) -> Experiment:
    """The experiment with the vocabulary of its data filled in; the data are not read.

    Raises `ConfigError` when the configured vocabulary is too small for them.
    """
    return resolved(experiment, tokenizer_of(experiment.data).vocab_size)


def plan_here(experiment: Experiment, compile_step: bool = True) -> Plan:
    """The plan of a resolved experiment on the devices that are here, real or virtual.

    Raises `ConfigError` when the experiment does not fit them.
    """
    mesh = make_mesh(experiment.mesh_sizes(jax.device_count()))
    return make_plan(experiment, mesh, compile_step, chip=chip_of(mesh.devices.flat[0].device_kind))


def plan_topology(experiment: Experiment, name: str, compile_step: bool = True) -> Plan:
    """The plan of a resolved experiment on a slice that is only described, such as v5p:4x4x4: compiled where possible.

    Raises `ConfigError` when the experiment does not fit the slice, or the slice does not exist.
    """
    topology = parse_topology(name)
    sizes = experiment.mesh_sizes(topology.size)
    missing = cannot_compile(topology)
    if compile_step and missing is None:
        devices = described_devices(topology)
        try:
            mesh = make_mesh(sizes, devices)
        except NotImplementedError as error:
            raise ConfigError(
                "mesh", sizes, f"an axis is not a product of sides of {topology.name}; choose others ({error})"
            ) from error
        return make_plan(experiment, mesh, chip=topology.chip)
    plan = make_plan(experiment, abstract_mesh(sizes), compile_step=False, chip=topology.chip)
    return dataclasses.replace(plan, compiled=missing if compile_step else None)


def make_plan(
    experiment: Experiment,
    mesh: Mesh | AbstractMesh,
    compile_step: bool = True,
    chip: Chip | None = None,
) -> Plan:
    """The plan of a resolved experiment on a mesh: of devices, described devices, or of none at all (not to compile).

    Nothing is allocated on the devices. Raises `ConfigError` when the experiment does not fit the mesh.
    """
    experiment.mesh_sizes(mesh.size)
    with _using(mesh):
        state = abstract_state(experiment, mesh)
        compiled = _compile(experiment, state, cast(Mesh, mesh)) if compile_step else None
    model, length = experiment.model, experiment.data.length
    counts = count(model)
    parts = tuple(
        PartRow(name, p.total, p.active, counts.part_flops(name, length)) for name, p in counts.parts().items()
    )
    tokens = experiment.train.batch_size * length
    parameters = device_bytes(nnx.split(state.model, nnx.Param, ...)[1])
    sizes = dict(mesh.shape)
    bytes_ = StateBytes(parameters, device_bytes(state.optimizer), parameters)
    return Plan(
        mesh=sizes,
        device_kind=mesh.devices.flat[0].device_kind if isinstance(mesh, Mesh) else chip.kind if chip else "none",
        chip=chip,
        tokens_per_step=tokens,
        model_flops=tokens * counts.flops_per_token(length),
        parts=parts,
        state=bytes_,
        estimate=estimate(experiment, sizes, bytes_.parameters, bytes_.optimizer),
        compiled=compiled,
    )


def _using(mesh: Mesh | AbstractMesh) -> contextlib.AbstractContextManager:
    return jax.set_mesh(mesh) if isinstance(mesh, Mesh) else jax.sharding.use_abstract_mesh(mesh)


def abstract_state(experiment: Experiment, mesh: Mesh | AbstractMesh) -> TrainState:
    """Shapes, dtypes and shardings of the state that training starts from. Call under `jax.set_mesh(mesh)`."""
    optimizer = build_optimizer(experiment.optim, experiment.train.steps)
    return state_shapes(_abstract_key(), experiment.model, optimizer, experiment.sharding.rules, mesh)


def device_bytes(tree: Any) -> int:
    """Bytes of the shards that one device holds of a tree of arrays, abstract or not, with shardings.

    The rules cut evenly, so that every device holds the same.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def trace_step(experiment: Experiment, state: TrainState, mesh: Mesh | AbstractMesh) -> Any:
    """The train step of a resolved experiment, traced (`jax.stages.Traced`); its `lower` makes the program.

    state: see `abstract_state`; call under the same mesh. On an abstract mesh, of no devices,
    `lower(lowering_platforms=("tpu",))` still works, and compiling does not.
    """
    train = experiment.train
    shape = (train.batch_size, experiment.data.length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, experiment.sharding.rules.act("B.")))
    batch = cast(Any, Batch)(*(tokens for _ in dataclasses.fields(Batch)))
    # Domains of a text are known only once it is read. They change a few sums of the metrics and nothing else.
    domains = experiment.data.grammar.num_domains if experiment.data.source == "grammar" else 1
    cut = (train.accumulate, domains, train.pipeline_microbatches)
    step = cast(Any, make_train_step(build_optimizer(experiment.optim, train.steps), *cut))
    return step.trace(state, batch, _abstract_key())


def _compile(experiment: Experiment, state: TrainState, mesh: Mesh) -> CompiledStep | OutOfMemory:
    start = time.perf_counter()
    lowered = trace_step(experiment, state, mesh).lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "limited ICI routing" in str(error):
            raise ConfigError(
                "model.moe.dispatcher",
                "ragged_all_to_all",
                "the links of such a slice have no ragged all-to-all; use all_to_all, or another slice",
            ) from error
        if "RESOURCE_EXHAUSTED" not in str(error) or "memory space vmem" in str(error):  # a kernel's own room
            raise
        return OutOfMemory(time.perf_counter() - start, needed_bytes(str(error)), str(error))
    seconds = time.perf_counter() - start
    memory, program = compiled.memory_analysis(), parse(compiled.as_text(), idle=FURTHER)
    return CompiledStep(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        # That of a CPU leaves out outputs.
        assigned=memory.peak_memory_in_bytes if mesh.devices.flat[0].platform == "tpu" else None,
        work=work(program, filled(experiment, mesh.shape)),
        collectives=collectives(program, dict(mesh.shape)),
        largest=largest(program, LARGEST),
    )


def needed_bytes(message: str) -> int | None:
    """What a program needs on a device, from the message of a compiler that found it too large; None if not said.

    Where it tells of temporaries alone, it is those.
    """
    for words in (r"Used ([\d.]+)([KMGT]?)i?B? of ", r"HLO temporaries \(([\d.]+)([KMGT]?)i?B?\)"):
        if found := re.search(words, message):
            return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " "))
    return None


def _abstract_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
