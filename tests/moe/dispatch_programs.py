"""Compiles a dispatcher alone, forward and with all its gradients, and says what is in the program.

As a program of its own it does so for a TPU that is not there, and prints the answer as JSON: a process has one TPU
compiler, and the flags of the tests are of the CPU's.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding

from sparse_lm.mesh import make_mesh
from sparse_lm.moe.dispatch import DISPATCHERS
from sparse_lm.moe.experts import Experts
from sparse_lm.moe.grouped import grouped_product, kernel_of
from sparse_lm.moe.slots import SlotRule
from sparse_lm.moe.types import TokenChoice
from sparse_lm.planning.hlo import Instruction, parse
from sparse_lm.planning.work import work
from sparse_lm.sharding import DEFAULT, abstract_sharded

ASYNC = {"xla_tpu_enable_async_all_to_all": "true"}  # as docs/performance.md says, there in LIBTPU_INIT_ARGS
MOVES = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layer: G groups of S tokens, K of E experts of width F, C slots; copies of the most loaded experts;
    room over the even share.
    """

    groups: int = 4
    size: int = 256
    top_k: int = 2
    experts: int = 8
    width: int = 64
    hidden: int = 128
    slots: int = 80
    copies: int = 0
    room: float = 2.0


ON_TPU = Sizes(width=512, hidden=1024, slots=128)  # on 4 devices


def compiled(name, sizes: Sizes, mesh, grouped="auto", gradients=False, dtype=jnp.float32, chunks=1, options=None):
    """The compiled program of one dispatcher on a mesh. gradients: by experts, tokens and gates as well.

    chunks: of its exchanges. options: of the compiler.
    """
    with jax.set_mesh(mesh):
        shape = (sizes.experts, sizes.width, sizes.hidden)
        graph, state = nnx.split(jax.eval_shape(lambda: Experts(jax.random.key(0), shape, "swiglu")))

        how = chunks, sizes.copies, sizes.room

        def output(state, x_GSD, expert_GSK, gate_GSK):
            dispatcher = DISPATCHERS[name](SlotRule(sizes.slots, "token"), DEFAULT, grouped, *how)
            return dispatcher(nnx.merge(graph, state), x_GSD, TokenChoice(expert_GSK, gate_GSK))[0]

        def loss(*arguments):
            return jnp.sum(jnp.sin(output(*arguments).astype(jnp.float32)))

        def described(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, DEFAULT.act("GSD")))

        tokens = (sizes.groups, sizes.size)
        arguments = (
            abstract_sharded(state, DEFAULT, mesh),
            described((*tokens, sizes.width), dtype),
            described((*tokens, sizes.top_k), jnp.int32),
            described((*tokens, sizes.top_k), jnp.float32),
        )
        function = jax.grad(loss, (0, 1, 3)) if gradients else output
        return jax.jit(function).lower(*arguments).compile(options)


def instructions(program) -> list[Instruction]:
    """All instructions of a compiled program."""
    return [one for body in parse(program.as_text()).computations.values() for one in body]


def moves(program) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each kind of collective yields."""
    found = collections.defaultdict(list)
    for one in instructions(program):
        kind = one.opcode.removesuffix("-start")
        if kind in MOVES:
            found[kind] += [array.shape for array in one.arrays]
    return dict(found)


def behind_products(program) -> int:
    """Exchanges that are under way while a product is computed: one stands between their start and their end."""
    parsed = parse(program.as_text())
    body = parsed.computations[parsed.entry]
    place = {one.name: number for number, one in enumerate(body)}

    def has_product(one: Instruction) -> bool:
        inside = [inner for name, *_ in parsed.calls(one) for inner in parsed.computations.get(name, ())]
        return (
            one.opcode in ("dot", "convolution") or "tpu_custom_call" in one.attributes or any(map(has_product, inside))
        )

    ends = [one for one in body if one.opcode.endswith("all-to-all-done")]
    return sum(any(map(has_product, body[place[one.operands[0]] : place[one.name]])) for one in ends)


def _refusal(left: str, right: str, dtype: str, device) -> str | None:
    """Of the compiler for a device: why it does not take the product of 8,192 rows with 2 matrices."""
    kernel, rows = kernel_of("auto", "tpu"), 8192

    def gradients(x_RA, w_EAB, count_E):
        layout = kernel.layout(count_E, rows)
        return jax.grad(lambda x, w: jnp.sum(grouped_product(x, w, layout, kernel) ** 2), (0, 1))(x_RA, w_EAB)

    where = SingleDeviceSharding(device)
    shapes = ((rows, int(left)), dtype), ((2, int(left), int(right)), dtype), ((2,), "int32")
    arguments = (jax.ShapeDtypeStruct(shape, kind, sharding=where) for shape, kind in shapes)
    try:
        jax.jit(gradients).lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as refused:
        return str(refused)
    return None


def main() -> None:
    """For each `dispatcher/kernel/chunks` in the arguments, forward and with gradients: collectives, those of them that
    are under way during a product, kernels, and FLOPs of a device. For each `width x width of type`, whether the
    grouped product of the platform, with both gradients, is compiled for one device: None, or the refusal.
    """
    from jax.experimental import topologies

    devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
    mesh = make_mesh({"data": 2, "expert": 2}, devices)
    sizes, answer = ON_TPU, {}
    for case in sys.argv[1:]:
        if " x " in case:
            answer[case] = _refusal(*case.replace(" of ", " x ").split(" x "), device=devices[0])
            continue
        name, grouped, chunks = case.split("/")
        for gradients in (False, True):
            program = compiled(name, sizes, mesh, grouped, gradients, jnp.bfloat16, int(chunks), ASYNC)
            found = instructions(program)
            count = collections.Counter(one.opcode.removesuffix("-start") for one in found)
            kernels = [one for one in found if one.opcode == "custom-call" and "tpu_custom_call" in one.attributes]
            kinds = {kind: count[kind] for kind in MOVES if count[kind]}
            answer[f"{case}/{'gradients' if gradients else 'forward'}"] = {
                **kinds,
                "behind_products": behind_products(program),
                "kernels": len(kernels),
                "flops": work(parse(program.as_text())).flops,
            }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
