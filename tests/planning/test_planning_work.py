"""FLOPs, bytes of main memory and the largest arrays, counted by hand."""

from __future__ import annotations

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest

from sparse_lm.planning.hlo import parse
from sparse_lm.planning.work import Buffer, convolution_flops, largest, work


def program(*lines, before=""):
    body = "\n".join(f"  {line}" for line in lines)
    return parse(f"HloModule jit_step\n{before}\nENTRY %main (x: f32[8,4]) -> f32[8,4] {{\n{body}\n}}\n")


def test_a_grouped_kernel_counts_the_rows_that_are_in_use():
    def kernel(name):
        cost = 'backend_config={"custom_call_config": {"cost_estimate": {"flops": 1000}}}'
        source = f'metadata={{op_name="jit(step)/shard_map/{name}/pallas_call"}}'
        call = 'custom-call(%x, %w), custom_call_target="tpu_custom_call"'
        return f"%{name[4]} = f32[8,4]{{1,0}} {call}, {source}, {cost}"

    arrays = "%x = f32[8,4]{1,0} parameter(0)", "%w = f32[2,4,4]{2,1,0} parameter(1)"
    found = program(*arrays, *map(kernel, ("jit(gmm)", "jit(tgmm)", "jit(attention)")))
    assert work(found).flops == 3000
    assert work(found, filled=0.5).flops == 2000
    matrices, rows = 2 * 4 * 4 * 4, 2 * 8 * 4 * 4  # of one kernel: weights, and what it reads and writes of rows
    assert work(found).memory_bytes == 3 * (matrices + rows)
    assert work(found, filled=0.5).memory_bytes == 3 * matrices + 2 * rows


def test_a_copy_beside_a_grouped_kernel_moves_all_rows():
    source = 'metadata={op_name="jit(step)/jit(gmm)/transpose"}'
    found = program("%x = f32[8,4]{1,0} parameter(0)", f"%y = f32[4,8]{{1,0}} transpose(%x), {source}")
    assert work(found, filled=0.5).memory_bytes == work(found).memory_bytes == 2 * 8 * 4 * 4


def convolution(left, right, out, attributes):
    """The FLOPs of a convolution between arrays of these shapes."""
    shapes = [",".join(map(str, shape)) for shape in (left, right, out)]
    found = program(
        f"%x = f32[{shapes[0]}] parameter(0)",
        f"%w = f32[{shapes[1]}] parameter(1)",
        f"ROOT %y = f32[{shapes[2]}] convolution(%x, %w), {attributes}",
    )
    return work(found).flops


def test_a_dot_counts_two_per_product():
    found = program(
        "%x = f32[3,8,4]{2,1,0} parameter(0)",
        "%y = f32[3,4,5]{2,1,0} parameter(1)",
        "ROOT %z = f32[3,8,5]{2,1,0} dot(%x, %y), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
        "rhs_batch_dims={0}, rhs_contracting_dims={1}",
    )
    assert work(found).flops == 2 * 3 * 8 * 5 * 4
    assert work(found).exact


# (left, right, result, attributes, FLOPs); the last one is how a TPU writes a product with a batch.
CONVOLUTIONS = [
    ((6, 4), (4, 5), (6, 5), "dim_labels=bf_io->bf", 2 * 6 * 4 * 5),
    ((6, 4), (5, 4), (6, 5), "dim_labels=bf_oi->bf", 2 * 6 * 4 * 5),
    ((1, 8, 1), (3, 1, 1), (1, 6, 1), "window={size=3}, dim_labels=b0f_0io->b0f", 2 * 6 * 3),
    ((1, 8, 1), (3, 1, 1), (1, 8, 1), "window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f", 2 * (8 * 3 - 2)),
    ((1, 8, 1), (3, 1, 1), (1, 3, 1), "window={size=3 stride=2}, dim_labels=b0f_0io->b0f", 2 * 9),
    (
        (4, 5, 6),
        (4, 6, 7),
        (4, 5, 7),
        "window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
        2 * 4 * 5 * 6 * 7,
    ),
]


@pytest.mark.parametrize(("left", "right", "out", "attributes", "flops"), CONVOLUTIONS)
def test_convolutions(left, right, out, attributes, flops):
    assert convolution(left, right, out, attributes) == flops


def test_heads_of_a_product_as_a_padded_window():
    """BLD,DHI->BLHI with 2 heads: each place of the window meets the single place of the input once."""
    attributes = "window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f"
    assert convolution((3, 8, 16, 1), (16, 2, 5, 1), (3, 8, 2, 5), attributes) == 2 * 3 * 8 * 16 * 2 * 5


@hypothesis.given(
    size=st.integers(1, 6),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilate=st.integers(1, 4),
    spread=st.integers(1, 3),
    low=st.integers(0, 3),
    output=st.integers(1, 7),
)
def test_a_window_counts_the_places_that_meet_the_input(size, kernel, stride, dilate, spread, low, output):
    """Against the definition: a place of the dilated, padded input is an element where the dilation divides it."""
    places = [o * stride + k * spread - low for o, k in itertools.product(range(output), range(kernel))]
    meets = sum(0 <= place <= (size - 1) * dilate and place % dilate == 0 for place in places)
    window = f"size={kernel} stride={stride} pad={low}_9 lhs_dilate={dilate} rhs_dilate={spread}"
    attributes = f"window={{{window}}}, dim_labels=b0f_0io->b0f"
    assert convolution((2, size, 3), (kernel, 3, 5), (2, output, 5), attributes) == 2 * 2 * 3 * 5 * meets


def test_a_convolution_that_cannot_be_read_is_refused():
    [instruction] = program("ROOT %y = f32[4] convolution(%a, %b), window={size=1}").computations["main"]
    with pytest.raises(ValueError, match="without dim_labels"):
        convolution_flops(instruction, (4,), (4,))


@pytest.mark.parametrize(("layers", "tokens"), [(1, 8), (5, 16)])
def test_a_scan_of_products_counts_each_iteration(layers, tokens):
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    text = jax.jit(f).lower(jnp.ones((tokens, 12)), jnp.ones((layers, 12, 12))).compile().as_text()
    assert text is not None
    assert work(parse(text)).flops == layers * 2 * tokens * 12 * 12


def test_a_kernel_tells_its_flops_or_is_named():
    cost = '{"custom_call_config":{"cost_estimate":{"flops":"640","bytes_accessed":"2"}}}'
    told = f'"tpu_custom_call", backend_config={cost}'
    silent = '"tpu_custom_call", backend_config={"custom_call_config":{}}'
    found = work(
        program(
            "%x = f32[8,4] parameter(0)",
            f"%y = f32[8,4] custom-call(%x), custom_call_target={told}",
            f"%z = f32[8,4] custom-call(%y), custom_call_target={silent}",
            '%b = f32[8,4] custom-call(), custom_call_target="AllocateBuffer"',
        )
    )
    assert (found.flops, found.unknown) == (640, ("tpu_custom_call",))


FUSED = """
%fused (p: f32[10,64], i: s32[], u: f32[64]) -> f32[10,64] {
  %p = f32[10,64]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %u = f32[64]{0} parameter(2)
  %row = f32[1,64]{1,0} dynamic-slice(%p, %i), dynamic_slice_sizes={1,64}
  ROOT %r = f32[64]{0} add(%u, %u)
}

%written (q: f32[10,64], v: f32[1,64], j: s32[]) -> f32[10,64] {
  %q = f32[10,64]{1,0} parameter(0)
  %v = f32[1,64]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %update = f32[10,64]{1,0} dynamic-update-slice(%q, %v, %j)
}
"""


@pytest.mark.parametrize(
    ("line", "moved"),
    [
        ("%y = f32[8,4]{1,0} add(%x, %x)", 3 * 128),
        ("%y = f32[8,4]{1,0:T(8,128)S(1)} add(%x, %x)", 2 * 128),  # into on-chip memory
        ("%y = f32[2,4]{1,0} slice(%x), slice={[0:2],[0:4]}", 2 * 32),
        ("%y = (f32[8,4]{1,0}) tuple(%x)", 0),
        ("%y = f32[32]{0} bitcast(%x)", 0),
        ("%y = f32[64]{0} fusion(%s, %n, %u), kind=kLoop, calls=%fused", 256 + 4 + 256 + 256),
        ("%y = f32[10,64]{1,0} fusion(%s, %v, %n), kind=kLoop, calls=%written", 256 + 256 + 4),
        ("%y = f32[10,64]{1,0} dynamic-update-slice(%s, %v, %n)", 2 * 256),
        ("%y = (f32[2,4]{1,0:S(1)}, f32[8,4]{1,0}, u32[]) slice-start(%x), slice={[0:2], [0:4]}", 32),
        ("%y = f32[8,4]{1,0} copy-done(%x)", 0),
    ],
)
def test_bytes_of_main_memory(line, moved):
    arguments = (
        "%x = f32[8,4]{1,0} parameter(0)",
        "%s = f32[10,64]{1,0} parameter(1)",
        "%n = s32[] parameter(2)",
        "%u = f32[64]{0} parameter(3)",
        "%v = f32[1,64]{1,0} parameter(4)",
    )
    assert work(program(*arguments, line, before=FUSED)).memory_bytes == moved


def test_the_largest_arrays_by_size_each_operation_once():
    name = 'metadata={op_name="jit(step)/scores"}'
    found = program(
        "%x = f32[8,4]{1,0} parameter(0)",
        f"%a = f32[9,200]{{1,0:T(8,128)}} broadcast(%x), {name}",
        f"%b = f32[9,200]{{1,0:T(8,128)}} broadcast(%x), {name}",
        "%c = f32[8,512]{1,0:T(8,128)S(1)} broadcast(%x)",  # on-chip memory
        "%d = bf16[100]{0} convert(%x)",
        "%e = f32[64]{0} fusion(%x, %x, %x), kind=kLoop, calls=%fused",
        before=FUSED,
    )
    assert largest(found, 2) == (
        Buffer(16 * 256 * 4, "f32[9,200]", "broadcast", "jit(step)/scores", 2),
        Buffer(256, "f32[64]", "fusion", "e", 1),
    )
    assert [buffer.type for buffer in largest(found, 9)] == ["f32[9,200]", "f32[64]", "bf16[100]"]
