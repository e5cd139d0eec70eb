"""Collectives are counted as often as they run, with the bytes that they move."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparse_lm.planning.collectives import KINDS, Collective, collectives, mesh_axes, replica_groups
from sparse_lm.planning.hlo import parse

ADD = """
%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}
"""


def found(text, mesh=None):
    return collectives(parse(text), mesh)


def entry(*lines: str, before: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule jit_step\n{ADD}{before}\nENTRY %main.9 (x: f32[8,4]) -> f32[8,4] {{\n{body}\n}}\n"


def loop(config: str) -> str:
    """A program with a loop around one all-reduce of 16 bytes."""
    body = """
%body.1 (c: (s32[], f32[4])) -> (s32[], f32[4]) {
  %c = (s32[], f32[4]{0}) parameter(0)
  %v = f32[4]{0} get-tuple-element(%c), index=1
  %all-reduce.7 = f32[4]{0} all-reduce(%v), channel_id=1, replica_groups={{0,1}}, to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%v, %all-reduce.7)
}

%condition.1 (c: (s32[], f32[4])) -> pred[] {
  %c = (s32[], f32[4]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}
"""
    return entry(
        "%x = (s32[], f32[4]{0}) parameter(0)",
        f"ROOT %while.1 = (s32[], f32[4]{{0}}) while(%x), condition=%condition.1, body=%body.1{config}",
        before=body,
    )


# (lines of the entry, kind, bytes): what an all-gather yields and a reduce-scatter takes.
SINGLE = [
    (["%x = f32[8,4]{1,0} parameter(0)", "%y = f32[16,4]{1,0} all-gather(%x), dimensions={0}"], "all-gather", 256),
    (
        ["%x = f32[8,4]{1,0} parameter(0)", "%y = f32[2,4]{1,0} reduce-scatter(%x), to_apply=%add"],
        "reduce-scatter",
        128,
    ),
    (["%x = bf16[8,4]{1,0} parameter(0)", "%y = bf16[8,4]{1,0} all-reduce(%x), to_apply=%add"], "all-reduce", 64),
    (["%x = pred[3]{0} parameter(0)", "%y = pred[3]{0} collective-permute(%x)"], "collective-permute", 3),
    (["%x = s32[] parameter(0)", "%y = s32[] all-reduce(%x), to_apply=%add"], "all-reduce", 4),
    (
        [
            "%x = f32[2]{0} parameter(0)",
            "%y = f8e4m3fn[2]{0} parameter(1)",
            "%z = (f32[2]{0}, /*index=1*/f8e4m3fn[2]{0}) all-to-all(%x, %y), replica_groups={{0,1}}",
        ],
        "all-to-all",
        10,
    ),
    (
        [
            "%x = f32[2]{0:T(128)} parameter(0)",
            "%s = (f32[2]{0:T(128)}, f32[8]{0:T(128)}) all-gather-start(%x), dimensions={0}",
            "%y = f32[8]{0:T(128)} all-gather-done(%s)",
        ],
        "all-gather",
        32,
    ),
    (
        [
            "%x = f32[8]{0} parameter(0)",
            "%s = f32[8]{0} all-reduce-start(%x), to_apply=%add",
            "%y = f32[8]{0} all-reduce-done(%s)",
        ],
        "all-reduce",
        32,
    ),
]


@pytest.mark.parametrize(("lines", "kind", "size"), SINGLE, ids=[f"{case[1]}-{i}" for i, case in enumerate(SINGLE)])
def test_one_collective(lines, kind, size):
    assert found(entry(*lines)) == (Collective(kind, 1, size, exact=True),)


def test_kinds_come_in_order_and_the_others_are_left_out():
    lines = ["%x = f32[2]{0} parameter(0)"]
    lines += [f"%y{i} = f32[2]{{0}} {kind}(%x)" for i, kind in enumerate(reversed(KINDS)) if kind != "all-reduce"]
    assert [one.kind for one in found(entry(*lines))] == [kind for kind in KINDS if kind != "all-reduce"]


def test_what_only_names_a_collective_is_none():
    lines = [
        "%all-gather.3 = f32[8,4]{1,0} parameter(0)",
        '%y = f32[8,4]{1,0} copy(%all-gather.3), metadata={op_name="jit(step)/all-gather(x)"}',
    ]
    assert found(entry(*lines)) == ()


def test_a_loop_of_known_length_multiplies():
    config = ', backend_config={"known_init_step":{"init":"0","step":"1"},"known_trip_count":{"n":"5"}}'
    assert found(loop(config)) == (Collective("all-reduce", 5, 80, exact=True),)


def test_a_loop_of_unknown_length_counts_once_and_says_so():
    assert found(loop("")) == (Collective("all-reduce", 1, 16, exact=False),)


def test_a_loop_of_unknown_length_without_collectives_leaves_the_others_exact():
    quiet = loop("").replace("all-reduce(%v), channel_id=1, replica_groups={{0,1}}, to_apply=%add", "negate(%v)")
    lines = "  %v2 = f32[4]{0} parameter(1)\n  %g = f32[8]{0} all-gather(%v2)\n  ROOT %while.1"
    assert found(quiet.replace("  ROOT %while.1", lines)) == (Collective("all-gather", 1, 32, exact=True),)


def test_every_branch_counts_and_is_not_exact():
    branches = "".join(
        f"\n%branch{i} (v: f32[4]) -> f32[4] {{\n  %v = f32[4]{{0}} parameter(0)\n"
        f"  ROOT %r = f32[4]{{0}} all-reduce(%v), to_apply=%add\n}}\n"
        for i in range(2)
    )
    text = entry(
        "%p = s32[] parameter(0)",
        "%v = f32[4]{0} parameter(1)",
        "ROOT %c = f32[4]{0} conditional(%p, %v, %v), branch_computations={%branch0, %branch1}",
        before=branches,
    )
    assert found(text) == (Collective("all-reduce", 2, 32, exact=False),)


def test_a_computation_that_is_called_twice_counts_twice():
    called = (
        "\n%inner (v: f32[4]) -> f32[4] {\n  %v = f32[4]{0} parameter(0)\n  ROOT %r = f32[4]{0} all-reduce(%v)\n}\n"
    )
    lines = ["%v = f32[4]{0} parameter(0)", *(f"%c{i} = f32[4]{{0}} call(%v), to_apply=%inner" for i in range(2))]
    assert found(entry(*lines, before=called)) == (Collective("all-reduce", 2, 32),)


def test_a_wrapped_asynchronous_collective_counts_once():
    body = "  %v = f32[4]{0} parameter(0)\n  ROOT %r = f32[2]{0} reduce-scatter(%v)"
    called = f"\n%wrapped (v: f32[4]) -> f32[2] {{\n{body}\n}}\n"
    lines = [
        "%v = f32[4]{0} parameter(0)",
        "%s = ((f32[4]{0}), f32[2]{0}, u32[]) async-start(%v), calls=%wrapped",
        "ROOT %d = f32[2]{0} async-done(%s), calls=%wrapped",
    ]
    assert found(entry(*lines, before=called)) == (Collective("reduce-scatter", 1, 16),)


def test_a_compiled_scan_is_counted_by_its_length(mesh_of):
    mesh = mesh_of(expert=4)

    @functools.partial(jax.shard_map, in_specs=P("expert"), out_specs=P("expert"))
    def exchanged(x):
        def body(x, _):
            return jax.lax.all_to_all(jnp.sin(x), "expert", split_axis=1, concat_axis=0, tiled=True).reshape(
                x.shape
            ), None

        return jax.lax.scan(body, x, None, length=7)[0]

    with jax.set_mesh(mesh):
        x = jnp.ones((16, 8), out_sharding=P("expert"))
        compiled = jax.jit(exchanged).lower(x).compile()
    # A device has 4 x 8 float32 of them and exchanges all of these, once per iteration.
    text = compiled.as_text()
    assert text is not None
    assert found(text) == (Collective("all-to-all", 7, 7 * 4 * 8 * 4),)


MESH = {"data": 2, "fsdp": 2, "expert": 2, "model": 1}


@pytest.mark.parametrize(
    ("attributes", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}, dimensions={0}", [[0, 1], [2, 3]]),
        ("replica_groups={}, to_apply=%add", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("channel_id=1, dimensions={0}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=[4,2]<=[2,2,2]T(0,2,1)", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_every_form(attributes, groups):
    assert replica_groups(attributes, 8).tolist() == groups


def test_groups_in_another_form_are_refused():
    with pytest.raises(ValueError, match="form that is not read"):
        replica_groups("replica_groups=<a new form>", 8)
    with pytest.raises(ValueError, match="different sizes"):
        replica_groups("replica_groups={{0},{1,2}}", 3)


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ([[0, 1], [2, 3], [4, 5], [6, 7]], ("expert",)),
        ([[0, 2], [1, 3], [4, 6], [5, 7]], ("fsdp",)),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], ("data",)),
        ([[0, 1, 2, 3], [4, 5, 6, 7]], ("fsdp", "expert")),
        ([[0, 1, 2, 3, 4, 5, 6, 7]], ("data", "fsdp", "expert")),
        ([[0], [1], [2]], ()),
    ],
)
def test_the_mesh_axes_of_groups(groups, axes):
    assert mesh_axes(np.array(groups), MESH) == axes


def test_a_device_outside_of_the_mesh_is_refused():
    with pytest.raises(ValueError, match="device 8"):
        mesh_axes(np.array([[0, 8]]), MESH)


def test_collectives_are_summed_by_axes_and_those_of_one_device_are_none():
    lines = ["%x = f32[8]{0} parameter(0)"]
    for i, groups in enumerate(
        ("{{0,1},{2,3},{4,5},{6,7}}", "[4,2]<=[2,4]T(1,0)", "{{0,1},{2,3},{4,5},{6,7}}", "[8,1]<=[8]")
    ):
        lines.append(f"%y{i} = f32[8]{{0}} all-reduce(%x), channel_id={i}, replica_groups={groups}, to_apply=%add")
    assert found(entry(*lines), MESH) == (
        Collective("all-reduce", 1, 32, True, ("data",)),
        Collective("all-reduce", 2, 64, True, ("expert",)),
    )


def fusion(name, *lines):
    return (
        f"\n%{name} (p: f32[8]) -> f32[4] {{\n  %p = f32[8]{{0}} parameter(0)\n"
        + "".join(f"  {x}\n" for x in lines)
        + "}\n"
    )


def test_a_reduce_scatter_of_a_tpu_is_one():
    """There it is an all-reduce in a fusion that keeps a slice."""
    called = fusion(
        "all-reduce-scatter.3.clone",
        "%all-reduce.1 = f32[8]{0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add",
        "ROOT %slice.1 = f32[4]{0} dynamic-slice(%all-reduce.1, %p), dynamic_slice_sizes={4}",
    )
    text = entry(
        "%x = f32[8]{0} parameter(0)",
        "ROOT %f = f32[4]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.3.clone",
        before=called,
    )
    assert found(text) == (Collective("reduce-scatter", 1, 32),)


def test_a_collective_in_pieces_counts_once():
    """A TPU names one all-gather in every fusion that it overlaps with, as a chain."""

    def piece(name, chain, channel):
        return fusion(
            name,
            f"%g.{name} = f32[16]{{0}} all-gather(%p), channel_id={channel}, replica_groups={{{{0,1}}}}, "
            f'dimensions={{0}}, frontend_attributes={{chain_id="{chain}"}}',
            f"ROOT %r.{name} = f32[4]{{0}} slice(%g.{name}), slice={{[0:4]}}",
        )

    called = piece("a", 0, 7) + piece("b", 0, 7) + piece("c", 0, 7) + piece("d", 1, 8)
    lines = [f"%f{n} = f32[4]{{0}} fusion(%x), kind=kLoop, calls=%{n}" for n in "abcd"]
    assert found(entry("%x = f32[8]{0} parameter(0)", *lines, before=called)) == (Collective("all-gather", 2, 128),)


@pytest.mark.parametrize(("have", "room"), [(64, 16), (16, 64)])
def test_a_ragged_exchange_moves_what_devices_have_at_even_loads(have, room):
    lines = [
        f"%x = f32[{have}]{{0}} parameter(0)",
        f"%o = f32[{room}]{{0}} parameter(1)",
        f"%y = f32[{room}]{{0}} ragged-all-to-all(%x, %o), replica_groups={{{{0,1}}}}",
    ]
    assert found(entry(*lines)) == (Collective("ragged-all-to-all", 1, 64),)
