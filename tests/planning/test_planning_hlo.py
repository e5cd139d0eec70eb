"""Instructions are read with their types, and run as often as the loops around them say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from sparse_lm.planning.hlo import ArrayType, array_types, parse

LOOP = """
HloModule jit_step

%body.1 (c: (s32[], f32[4])) -> (s32[], f32[4]) {{
  %c = (s32[], f32[4]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %v = f32[4]{{0}} get-tuple-element(%c), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %w = f32[4]{{0}} negate(%v)
  ROOT %t = (s32[], f32[4]{{0}}) tuple(%next, %w)
}}

%condition.1 (d: (s32[], f32[4])) -> pred[] {{
  %bound = s32[]{{:T(128)}} constant({bound})
  %d = (s32[], f32[4]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%d), index=0
  ROOT %less = pred[] compare(%j, %bound), direction={direction}, metadata={{op_name="jit(step)/while/cond/lt"}}
}}

ENTRY %main.9 (y: f32[4]) -> (s32[], f32[4]) {{
  %y = f32[4]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copy.1 = s32[] copy(%zero)
  %x = (s32[], f32[4]{{0}}) tuple(%copy.1, %y)
  ROOT %while.1 = (s32[], f32[4]{{0}}) while(%x), condition=%condition.1, body=%body.1{noted}
}}
"""


def text(bound=6, step=1, direction="LT", noted="", start=0):
    return LOOP.format(bound=bound, step=step, direction=direction, noted=noted, start=start)


def loop(**options):
    return parse(text(**options))


def runs(program, opcode):
    """(times, exact) of the instructions with this opcode."""
    return [(e.times, e.exact) for e in program.executions() if e.instruction.opcode == opcode]


def test_a_loop_over_what_even_loads_leave_empty_does_not_run():
    noted = ', metadata={op_name="jit(step)/transpose(jvp(further))/while"}'
    assert runs(parse(text(noted=noted), idle="further"), "negate") == [(0, True)]
    assert runs(parse(text(noted=noted)), "negate") == runs(parse(text(), idle="further"), "negate") == [(6, True)]


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, 6),
        ({"step": 2}, 3),
        ({"step": 4}, 2),
        ({"direction": "LE"}, 7),
        ({"bound": 0}, 0),
        ({"start": 4}, 2),
        ({"start": 9}, 0),
    ],
)
def test_the_condition_tells_the_length_of_a_loop(options, times):
    assert runs(loop(**options), "negate") == [(times, True)]


def test_what_the_compiler_noted_goes_first():
    noted = ', backend_config={"known_trip_count":{"n":"9"}}'
    assert runs(loop(noted=noted), "negate") == [(9, True)]


@pytest.mark.parametrize("options", [{"direction": "GT"}, {"direction": "NE"}, {"step": 0}, {"step": -1}])
def test_a_loop_that_does_not_count_up_is_not_known(options):
    assert runs(loop(**options), "negate") == [(1, False)]


def test_a_loop_without_a_bound_is_not_known():
    for known, unknown in (
        ("constant(6)", "get-tuple-element(%d), index=0"),  # the bound
        ("constant(1)", "get-tuple-element(%c), index=0"),  # the step
        ("constant(0)", "parameter(1)"),  # the start
        ("condition=%condition.1, ", ""),
    ):
        assert runs(parse(text().replace(known, unknown)), "negate") == [(1, False)]


def test_loops_within_loops_multiply():
    inner = text(bound=3).replace("ENTRY %main.9", "%called")
    inner = inner.replace("body.1", "body.0").replace("condition.1", "condition.0").replace("HloModule jit_step", "")
    outer = text(bound=5).replace("%w = f32[4]{0} negate(%v)", "%w = f32[4]{0} call(%v), to_apply=%called")
    assert runs(parse(inner + outer), "negate") == [(15, True)]


def test_a_counter_in_a_fusion_is_followed():
    added = """
%added (a: s32[], b: s32[]) -> s32[] {
  %a = s32[] parameter(0)
  %b = s32[] parameter(1)
  ROOT %sum = s32[] add(%a, %b)
}
"""
    fused = text(bound=8, step=2).replace("add(%i, %step)", "fusion(%i, %step), kind=kLoop, calls=%added")
    assert runs(parse(added + fused), "negate") == [(4, True)]


def test_scopes_look_through_fusions():
    program = """
%inner (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %n = f32[4]{0} negate(%p)
}

%outer (q: f32[4]) -> f32[4] {
  %q = f32[4]{0} parameter(0)
  ROOT %f = f32[4]{0} fusion(%q), kind=kLoop, calls=%inner
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  ROOT %g = f32[4]{0} fusion(%x), kind=kLoop, calls=%outer
}
"""
    [found] = [e for e in parse(program).executions() if e.instruction.opcode == "negate"]
    assert (found.computation, found.scope) == ("inner", "main")


def test_an_instruction_has_its_name_operands_and_source():
    program = """
ENTRY %main (x: f32[4]) -> (f32[4], f32[4]) {
  %x = f32[4]{0} parameter(0)
  ROOT %t.2 = (f32[4]{0}, /*index=1*/f32[4]{0}) tuple(%x, %x), metadata={op_name="jit(step)/add" stack_frame_id=3}
}
"""
    instruction = parse(program).computations["main"][-1]
    assert (instruction.name, instruction.opcode, instruction.operands) == ("t.2", "tuple", ("x", "x"))
    assert (instruction.root, instruction.bytes, instruction.op_name) == (True, 32, "jit(step)/add")


@pytest.mark.parametrize(
    ("written", "expected", "size", "padded"),
    [
        ("f32[8,4]{1,0}", ArrayType("f32", (8, 4), (1, 0)), 128, 128),
        ("bf16[3,5]{1,0:T(8,128)(2,1)}", ArrayType("bf16", (3, 5), (1, 0), (8, 128)), 30, 2 * 8 * 128),
        ("bf16[3,5]{0,1:T(8,128)(2,1)S(1)}", ArrayType("bf16", (3, 5), (0, 1), (8, 128), 1), 30, 2 * 8 * 128),
        ("f32[2,9,100]{1,2,0:T(8,128)}", ArrayType("f32", (2, 9, 100), (1, 2, 0), (8, 128)), 7200, 4 * 2 * 128 * 104),
        ("s32[]{:T(128)}", ArrayType("s32", (), (), (128,)), 4, 4),
        ("pred[3]", ArrayType("pred", (3,)), 3, 3),
        ("u4[3]{0}", ArrayType("u4", (3,), (0,)), 2, 2),
        ("f32[<=8]{0}", ArrayType("f32", (8,), (0,)), 32, 32),
        ("token[]", ArrayType("token", ()), 0, 0),
    ],
)
def test_types(written, expected, size, padded):
    [found] = array_types(written)
    assert (found, found.bytes, found.padded_bytes) == (expected, size, padded)


def test_the_types_of_a_tuple():
    assert [array.bytes for array in array_types("(f32[4]{0:T(128)}, (bf16[2]{0}, s32[]))")] == [16, 4, 4]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("%add (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n")


def test_a_compiled_scan_runs_its_body_by_its_length():
    def f(x):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ x), None), x, None, length=7)[0]

    compiled = jax.jit(f).lower(jnp.ones((4, 4))).compile().as_text()
    assert compiled is not None
    assert sum(times for times, _ in runs(parse(compiled), "tanh")) == 7
