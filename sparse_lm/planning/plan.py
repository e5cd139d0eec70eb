"""What a run will need, before it runs: parameters, bytes per device, communication and FLOPs of its train step.

Nothing is trained and no data are read. The train step that is compiled here is the one that training compiles.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from sparse_lm.batch import Batch
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.models.counts import count, table
from sparse_lm.optim.build import build_optimizer
from sparse_lm.planning.hlo import Collective, collectives
from sparse_lm.sharding import DEFAULT, Rules, abstract_sharded
from sparse_lm.train.restore import tokenizer_of
from sparse_lm.train.state import TrainState, create_state
from sparse_lm.train.step import make_train_step


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Bytes on one device. gradients: as large as the parameters, and cut like them; they live within a step only."""

    parameters: int
    optimizer: int
    gradients: int


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says about the train step; bytes, FLOPs and collectives are those of one device.

    arguments: state, batch and key. outputs: new state and metrics. aliased: of the outputs, what takes the place of
    arguments, because the state is donated. temporaries: everything in between: activations, gradients, buffers.
    flops: XLA's own estimate, or None where it makes none; the body of a loop, such as that over layers or over
    microbatches, counts once, however often it runs. seconds: of trace and compilation, or of loading it from a cache.
    """

    seconds: float
    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    flops: float | None
    collectives: tuple[Collective, ...]

    @property
    def peak(self) -> int:
        """An upper bound of the bytes in use at once."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


@dataclasses.dataclass(frozen=True)
class PartRow:
    """One line of the table of parameters; `flops` are training FLOPs per token."""

    name: str
    total: int
    active: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """See the module. model_flops: of one step over all devices, by the conventions of `models.counts`."""

    mesh: dict[str, int]
    device_kind: str
    tokens_per_step: int
    model_flops: int
    parts: tuple[PartRow, ...]
    state: StateBytes
    compiled: CompiledStep | None

    def to_json(self) -> dict[str, Any]:
        """Every number of the plan, ready for `json.dump`."""
        values = dataclasses.asdict(self)
        if self.compiled is not None:
            values["compiled"]["peak"] = self.compiled.peak
        return values


def resolve(experiment: Experiment) -> Experiment:
    """The experiment with the vocabulary of its data filled in; the data are not read.

    Raises `ConfigError` when the configured vocabulary is too small for them.
    """
    return resolved(experiment, tokenizer_of(experiment.data).vocab_size)


def make_plan(experiment: Experiment, mesh: Mesh, compile_step: bool = True, rules: Rules = DEFAULT) -> Plan:
    """The plan of a resolved experiment on a mesh, which may be one of devices that are only described.

    Nothing is allocated on the devices. Raises `ConfigError` when the experiment does not fit the mesh.
    """
    experiment.mesh_sizes(mesh.size)
    with jax.set_mesh(mesh):
        state = abstract_state(experiment, mesh, rules)
        compiled = _compile(experiment, state, mesh, rules) if compile_step else None
    model, length = experiment.model, experiment.data.length
    counts = count(model)
    parts = tuple(
        PartRow(name, p.total, p.active, counts.part_flops(name, length)) for name, p in counts.parts().items()
    )
    tokens = experiment.train.batch_size * length
    parameters = device_bytes(nnx.split(state.model, nnx.Param, ...)[1])
    return Plan(
        mesh=dict(mesh.shape),
        device_kind=mesh.devices.flat[0].device_kind,
        tokens_per_step=tokens,
        model_flops=tokens * counts.flops_per_token(length),
        parts=parts,
        state=StateBytes(parameters, device_bytes(state.optimizer), parameters),
        compiled=compiled,
    )


def abstract_state(experiment: Experiment, mesh: Mesh, rules: Rules = DEFAULT) -> TrainState:
    """Shapes, dtypes and shardings of the state that training starts from. Call under `jax.set_mesh(mesh)`."""
    optimizer = build_optimizer(experiment.optim, experiment.train.steps)

    def create(key):
        return create_state(key, experiment.model, optimizer, rules)

    return abstract_sharded(jax.eval_shape(create, _abstract_key()), rules, mesh)


def device_bytes(tree: Any) -> int:
    """Bytes of the shards that one device holds of a tree of arrays, abstract or not, with shardings.

    The rules cut evenly, so that every device holds the same.
    """
    leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "sharding")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _compile(experiment: Experiment, state: TrainState, mesh: Mesh, rules: Rules) -> CompiledStep:
    train = experiment.train
    shape = (train.batch_size, experiment.data.length + 1)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(mesh, rules.act("BL")))
    batch = cast(Any, Batch)(*(tokens for _ in dataclasses.fields(Batch)))
    # Domains of a text are known only once it is read. They change a few sums of the metrics and nothing else.
    domains = experiment.data.grammar.num_domains if experiment.data.source == "grammar" else 1
    step = cast(Any, make_train_step(build_optimizer(experiment.optim, train.steps), train.accumulate, domains))
    start = time.perf_counter()
    compiled = step.lower(state, batch, _abstract_key()).compile()
    seconds = time.perf_counter() - start
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return CompiledStep(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=cost.get("flops"),
        collectives=collectives(compiled.as_text()),
    )


def _abstract_key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))


def describe(plan: Plan, experiment: Experiment) -> str:
    """The plan as text to print. experiment: the one that the plan was made for."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one"
    lines = [table(experiment.model, experiment.data.length), f"devices: {mesh} ({plan.device_kind})", ""]
    state = plan.state
    total = state.parameters + state.optimizer
    lines += _aligned(
        [
            ("bytes per device", ""),
            ("  parameters", _binary(state.parameters)),
            ("  optimizer state", _binary(state.optimizer)),
            ("  kept between steps", _binary(total)),
            ("  gradients", _binary(state.gradients)),
        ]
    )
    if plan.compiled is not None:
        lines += ["", *_describe_compiled(plan.compiled)]
    lines += ["", f"model FLOPs per step: {plan.model_flops:.4g} ({plan.tokens_per_step:,} tokens, all devices)"]
    flops = plan.compiled.flops if plan.compiled else None
    if flops is not None:
        lines.append(
            f"XLA's estimate: {flops:.4g} per device; it counts the body of a loop (layers, microbatches) once"
        )
    return "\n".join(lines)


def _describe_compiled(step: CompiledStep) -> list[str]:
    rows = [
        ("arguments", step.arguments),
        ("outputs", step.outputs),
        ("of them in place of arguments", step.aliased),
        ("temporaries", step.temporaries),
        ("at most in use", step.peak),
    ]
    lines = [f"train step, compiled in {step.seconds:.1f} s; bytes per device"]
    lines += _aligned([(f"  {name}", _binary(size)) for name, size in rows])
    if not step.collectives:
        return [*lines, "", "collectives: none"]
    cells = [
        (f"  {c.kind}", f"{c.count:,} x", _binary(c.bytes), "" if c.exact else "(at least)") for c in step.collectives
    ]
    lines += ["", "collectives per step, and bytes of operand or result per device", *_aligned(cells)]
    if not all(found.exact for found in step.collectives):
        lines.append("  (at least): some are in a loop of unknown length, counted as one iteration, or in a branch")
    return lines


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(row)))]).rstrip()
        for row in rows
    ]


def _binary(size: int) -> str:
    """Bytes as a person reads them: 1536 is 1.5 KiB."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{size:,} B" if unit == "B" else f"{value:.4g} {unit}"
