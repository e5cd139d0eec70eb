"""Every kernel of grouped products against one product per expert: loads of all kinds, both gradients, bfloat16."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.machinery
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import triton_machine
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lm.config import ConfigError
from sparse_lm.moe.grouped import KERNELS, Layout, blocks, grouped_product, kernel_of, megablox, triton
from sparse_lm.moe.grouped.blocks import Blocks, most_together
from sparse_lm.moe.grouped.layout import block_size
from sparse_lm.moe.grouped.megablox import Megablox, tile_width
from sparse_lm.moe.grouped.ragged import RaggedDot, Tokamax
from sparse_lm.moe.grouped.triton import OPTIONS, Triton

D, F = 5, 3
HERE = {  # what runs on a CPU
    "blocks": Blocks(),
    "ragged_dot": RaggedDot(),
    "megablox": Megablox(interpret=True),
    "triton": Triton(interpret=True),
}
COUNTS = {
    "even": [4, 4, 4],
    "one": [0, 12, 0],
    "last": [0, 0, 9],
    "none": [0, 0, 0],
    "few": [1, 0, 7],
    "blocks": [8, 16, 24],
    "over": [9, 17, 25],
    "large": [300, 1, 0, 130],
}


def placed(counts, layout: Layout, rng, width=D):
    """Rows of every expert in their places, zeros elsewhere; and the expert of each row, -1 for empty ones."""
    x = np.zeros((layout.rows, width), np.float32)
    expert = np.full(len(x), -1)
    for e, count in enumerate(counts):
        start = int(layout.first_row_E[e])
        x[start : start + count] = rng.normal(size=(count, width))
        expert[start : start + count] = e
    return x, expert


@functools.partial(jax.jit, static_argnums=0)
def with_gradients(kernel, x, w, dy, layout):
    y, pull = jax.vjp(lambda x, w: grouped_product(x, w, layout, kernel), x, w)
    return y, *pull(dy)


def check(kernel, counts, rows=None):
    rng = np.random.default_rng(0)
    layout = kernel.layout(jnp.asarray(counts, jnp.int32), rows or max(sum(counts), 1))
    x, expert = placed(counts, layout, rng)
    w = rng.normal(size=(len(counts), D, F)).astype(np.float32)
    dy = np.where(expert[:, None] >= 0, rng.normal(size=(len(x), F)), 0).astype(np.float32)
    y, dx, dw = with_gradients(kernel, x, w, dy, layout)
    exact = products(x, w, dy, expert)
    np.testing.assert_allclose(y, exact[0], atol=1e-5)
    np.testing.assert_allclose(dx, exact[1], atol=1e-5)
    np.testing.assert_allclose(dw, exact[2], rtol=1e-5, atol=1e-5)


def products(x, w, dy, expert):
    """Result and both gradients in float64."""
    one_hot = expert[:, None] == np.arange(len(w))
    x, w, dy = (np.asarray(one, np.float64) for one in (x, w, dy))
    return (
        np.einsum("re,rd,edf->rf", one_hot, x, w),
        np.einsum("re,rf,edf->rd", one_hot, dy, w),
        np.einsum("re,rd,rf->edf", one_hot, x, dy),
    )


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("counts", COUNTS)
def test_every_row_meets_its_expert(name, counts):
    check(HERE[name], COUNTS[counts])


@pytest.mark.parametrize("name", HERE)
def test_rows_that_are_not_in_use_are_zero_whatever_x_holds(name):
    kernel, counts = HERE[name], [5, 0, 2]
    layout = kernel.layout(jnp.asarray(counts, jnp.int32), 12)
    x = jnp.ones((layout.rows, D))
    y, dx, dw = with_gradients(kernel, x, jnp.ones((3, D, F)), jnp.ones((layout.rows, F)), layout)
    used = int(layout.used)
    assert used < layout.rows
    np.testing.assert_array_equal(y[used:], 0)
    np.testing.assert_array_equal(dx[used:], 0)
    # Rows beyond the counts do not reach the gradient of any matrix; `blocks` counts whole blocks.
    np.testing.assert_array_equal(dw[:, 0, 0], np.asarray(layout.number_E) * layout.size)


@settings(max_examples=10)
@given(counts=st.lists(st.integers(0, 40), min_size=4, max_size=4))
def test_any_loads(counts):
    check(HERE["blocks"], counts, 160)  # one shape, one program


@settings(max_examples=20)
@given(st.sampled_from([1, 5, 64]).flatmap(lambda n: st.lists(st.integers(0, 500), min_size=n, max_size=n)))
def test_there_is_always_room_for_blocks(counts):
    layout = Blocks().layout(jnp.asarray(counts, jnp.int32), max(sum(counts), 1))
    assert int(jnp.sum(layout.number_E)) <= layout.total
    used = np.asarray(layout.number_E) * layout.size
    assert np.all(used >= counts) and np.all(used < np.asarray(counts) + layout.size)
    np.testing.assert_array_equal(layout.first_E, np.cumsum(layout.number_E) - layout.number_E)


@pytest.mark.parametrize(("rows", "experts", "size"), [(8192, 8, 32), (8192, 128, 16), (8192, 256, 8), (1, 64, 8)])
def test_blocks_shrink_where_they_would_be_half_empty(rows, experts, size):
    assert block_size(blocks.SIZES, rows, experts) == size


@pytest.mark.parametrize(
    ("rows", "experts", "together"),
    [(8192, 8, 32), (8192, 32, 8), (4096, 64, 8), (65_536, 8, 32), (8, 2, 2), (1, 8, 8)],
)
def test_the_largest_product_is_that_of_an_even_load(rows, experts, together):
    layout = Blocks().layout(jnp.asarray([rows, *[0] * (experts - 1)], jnp.int32), rows)
    assert most_together(layout) == together


@pytest.mark.parametrize(
    ("rows", "experts", "tile"), [(1, 2, 128), (2047, 2, 128), (2048, 2, 256), (8192, 2, 512), (57_344, 63, 128)]
)
def test_megablox_has_whole_tiles_of_rows_that_few_experts_share(rows, experts, tile):
    assert block_size(megablox.ROWS, rows, experts) == tile
    total = Megablox().layout(jnp.asarray([rows, *[0] * (experts - 1)]), rows).rows
    assert total == -(-rows // tile) * tile


@pytest.mark.parametrize(
    ("width", "tile"), [(64, 64), (854, 854), (1024, 1024), (1408, 768), (2048, 1024), (1280, 640)]
)
def test_megablox_fills_up_a_width_with_few_columns(width, tile):
    assert tile_width(width) == tile


@pytest.mark.parametrize(("rows", "experts", "size"), [(1, 2, 16), (8192, 8, 128), (8192, 32, 64), (65_536, 128, 128)])
def test_blocks_of_triton_are_as_large_as_half_empty_ones_allow(rows, experts, size):
    assert block_size(triton.ROWS, rows, experts) == size


@pytest.mark.parametrize(("name", "width"), [("megablox", 1100), ("triton", 140)])
@pytest.mark.parametrize("counts", [(300, 0, 1500, 248), (0, 2048, 0, 0)])
def test_kernels_with_many_tiles_are_the_same(counts, name, width):
    counts_E, rows, shape = jnp.asarray(counts, jnp.int32), sum(counts), (len(counts), 140, width)
    w = jax.random.normal(jax.random.key(0), shape)
    found, wanted = [], []
    for kernel, results in ((HERE[name], found), (HERE["ragged_dot"], wanted)):
        layout = kernel.layout(counts_E, rows)
        x, expert = placed(counts, layout, np.random.default_rng(0), 140)
        dy = np.zeros((layout.rows, width), np.float32)
        dy[expert >= 0] = np.random.default_rng(1).normal(size=(rows, width))
        y, dx, dw = with_gradients(kernel, x, w, dy, layout)
        results += [y[expert >= 0], dx[expert >= 0], dw]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", HERE)
def test_bfloat16_accumulates_in_float32(name):
    kernel, rows = HERE[name], 600
    layout = kernel.layout(jnp.asarray([rows], jnp.int32), rows)
    one = (jnp.arange(layout.rows) < rows).astype(jnp.bfloat16)[:, None]
    x, w = jnp.broadcast_to(one, (layout.rows, 4096)), jnp.full((1, 4096, 1), 2.0**-9, jnp.bfloat16)
    y, dx, dw = with_gradients(kernel, x, w, one, layout)
    assert {y.dtype, dx.dtype, dw.dtype} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(y[:rows, 0], 8.0)  # a bfloat16 sum would stop at 1 or 2
    np.testing.assert_array_equal(dw, 600.0)  # and one of ones at 256
    np.testing.assert_array_equal(dx[:rows], 2.0**-9)


def test_auto_is_a_kernel_that_the_platform_has():
    assert kernel_of("auto", "cpu") is KERNELS["blocks"]
    assert kernel_of("auto", "gpu") is KERNELS["triton"]
    assert kernel_of("auto", "tpu") is KERNELS["megablox"]
    assert [kernel_of(name, "tpu") for name in ("blocks", "ragged_dot", "megablox")] == [
        Blocks(),
        RaggedDot(),
        Megablox(),
    ]


def test_triton_is_refused_on_gpus_that_are_too_old_and_auto_takes_blocks(monkeypatch):
    def gpu(capability):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda: [device])

    for capability in ("8.0", "9.0", "12.0", "gfx942"):
        gpu(capability)
        assert kernel_of("triton", "gpu") is kernel_of("auto", "gpu") is KERNELS["triton"]
    gpu("7.5")
    assert kernel_of("auto", "gpu") is KERNELS["blocks"]
    with pytest.raises(ConfigError, match=r"grouped='triton'.*needs compute capability 8.0 and this GPU has 7.5"):
        kernel_of("triton", "gpu")
    with pytest.raises(ConfigError, match=r"grouped='triton'.*has kernels for GPU and the device is a tpu"):
        kernel_of("triton", "tpu")


def triton_calls(kernel, rows, shape, dtype):
    """What Triton gets for forward and both gradients."""
    experts, inner, outer = shape
    layout = kernel.layout(jnp.full((experts,), rows // experts, jnp.int32), rows)
    kinds = (((layout.rows, inner), dtype), (shape, dtype), ((layout.rows, outer), dtype))
    arguments = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    lowered = with_gradients.trace(kernel, *arguments, layout).lower(lowering_platforms=("cuda",))
    return list(triton_machine.calls(lowered.compiler_ir().operation))


class Machine(Triton):
    """Triton's own programs, executed by `triton_machine`."""

    def _call(self, kernel, result, grid, operands):
        function = jax.jit(functools.partial(Triton()._call, kernel, result, grid))
        lowered = function.trace(operands).lower(lowering_platforms=("cuda",))
        (call,) = triton_machine.calls(lowered.compiler_ir().operation)
        assert call.grid == (*grid, 1)[:3]
        written = np.full(result.shape, np.inf, result.dtype)  # stays where nothing is written
        triton_machine.execute(call, [*(np.asarray(one).reshape(-1) for one in operands), written.reshape(-1)])
        return jnp.asarray(written)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("counts", [[20, 0, 33], [0, 0, 0], [0, 64, 0]])
@pytest.mark.parametrize(("inner", "outer"), [(24, 40), (128, 300)])
def test_the_programs_that_triton_gets_compute_every_product(counts, inner, outer, dtype):
    kernel, rng = Machine(), np.random.default_rng(0)
    layout = kernel.layout(jnp.asarray(counts, jnp.int32), 64)
    x, expert = placed(counts, layout, rng, inner)
    dy = np.where(expert[:, None] >= 0, rng.normal(size=(len(x), outer)), 0)
    x, w, dy = (jnp.asarray(one, dtype) for one in (x, rng.normal(size=(len(counts), inner, outer)), dy))
    found = kernel.times(x, w, layout, False), kernel.times(dy, w, layout, True), kernel.outer(x, dy, layout, w.dtype)
    rounding = 2.0**-8 if dtype == "bfloat16" else 1e-5
    for one, other in zip(found, products(x, w, dy, expert), strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=rounding, atol=1e-4)


def test_the_programs_that_triton_gets_give_nan_where_counts_do_not_fit():
    kernel = Machine()
    layout = dataclasses.replace(kernel.layout(jnp.asarray([20, 33]), 64), total=3)
    y = kernel.times(jnp.ones((layout.rows, 24)), jnp.ones((2, 24, 40)), layout, False)
    assert y.shape == (48, 40) and bool(jnp.all(jnp.isnan(y)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8, 512, 1024), (4, 24, 40)], ids=["whole tiles", "parts of tiles"])
def test_triton_gets_a_program_for_each_product(shape, dtype):
    times, back, outer = (triton_machine.text(call.program) for call in triton_calls(Triton(), 8192, shape, dtype))
    for program in (times, back, outer):
        assert program.count("tt.dot") == program.count("scf.for") == program.count("tt.store") == 1
    assert "tt.trans" not in times and back.count("tt.trans") == outer.count("tt.trans") == 1


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(8, 512, 1024), (4, 24, 40), (32, 2880, 2880)])
def test_triton_compiles_them_for_gpus_that_are_not_here(shape, dtype, capability, tmp_path):
    library, compiler = (importlib.import_module(name) for name in ("triton", "triton.backends.compiler"))  # large
    for number, call in enumerate(triton_calls(Triton(), 16_384, shape, dtype)):
        path = tmp_path / f"{number}.ttir"
        path.write_text(triton_machine.text(call.program))
        target = compiler.GPUTarget("cuda", capability, 32)
        compiled = library.compile(str(path), target=target, options=OPTIONS)
        assert compiled.asm["cubin"]
        # Both are matrix units; those of Hopper that work on their own want whole tiles.
        assert ("wgmma.mma_async" if capability == 90 and min(shape[1:]) >= 128 else "mma") in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 99 * 1024  # what the smallest of these GPUs give to a program


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_megablox_is_refused_where_it_has_no_kernel(platform):
    with pytest.raises(ConfigError, match=f"model.moe.grouped='megablox'.*{platform}; use auto, or blocks"):
        kernel_of("megablox", platform)


def test_tokamax_is_refused_where_it_is_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model.moe.grouped='tokamax'.*pip install tokamax, or use auto"):
        kernel_of("tokamax", "gpu")


def test_tokamax_gets_the_arguments_of_ragged_dot_general(monkeypatch):
    stand_in = types.ModuleType("tokamax")
    stand_in.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    calls = []

    def ragged_dot_general(*arguments, **options):
        calls.append(options)
        return jax.lax.ragged_dot_general(*arguments, **options)

    stand_in.ragged_dot_general = ragged_dot_general  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokamax", stand_in)
    assert kernel_of("tokamax", "cpu") == Tokamax()
    check(Tokamax(), COUNTS["few"])
    assert calls == [{"preferred_element_type": jnp.float32}] * 3
    unchecked = {name for name, kernel in KERNELS.items() if not kernel.checked}
    assert unchecked == {"tokamax", "megablox"}
