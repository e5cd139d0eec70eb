"""Figures about routing: loads relative to an even one, idle experts, units and references, for runs of any shape."""

# An element or attribute that is missing fails the test by itself.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import base64
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from telemetry_fake_run import train_rows, write_run

from sparse_lm.telemetry import routing
from sparse_lm.telemetry.rundata import load_run

NS = "{http://www.w3.org/2000/svg}"


def run_of(tmp_path, train):
    return load_run(write_run(tmp_path, list(train), [], 100))


def row(step, **layers):
    return {"step": step, "split": "train", "layers": {"load": [[0.5, 0.5]], **layers}}


def words(figure):
    return [text.text for text in ET.fromstring(figure.svg).iter(f"{NS}text")]


def names(figure):
    return [path.get("data-name") for path in ET.fromstring(figure.svg).iter(f"{NS}path")]


def test_a_dense_run_has_no_routing(tmp_path):
    run = run_of(tmp_path, train_rows(5, 0, 0))
    assert not routing.is_sparse(run)
    assert routing.load_maps(run) == [] and routing.balance(run) == []
    assert routing.idle_experts(run) is None
    for make in (routing.drops, routing.drops_by_position, routing.entropy, routing.gates):
        assert make(run) is None


@pytest.mark.parametrize(
    "extra", [{"max_violation": 0.1}, {"router_entropy": 1.0}, {"load_balance": 1.0}, {"attention_load_balance": 1.0}]
)
def test_scalars_alone_make_a_run_sparse(tmp_path, extra):
    assert routing.is_sparse(run_of(tmp_path, [{"step": 1, **extra}]))


def test_load_maps_show_load_over_an_even_load(tmp_path):
    # Four experts: a quarter each is 1, half is 2, an eighth is 0.5.
    loads = [[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.125, 0.125]]
    run = run_of(tmp_path, [{"step": s, "layers": {"load": [load]}} for s, load in zip((10, 20), loads, strict=True)])
    (figure,) = routing.load_maps(run)
    svg = ET.fromstring(figure.svg)
    cells = np.frombuffer(base64.b64decode(svg.get("data-cells")), np.uint8).reshape(4, 2).astype(float)
    ratios = 4.0 ** (2 * cells / 254 - 1)
    assert ratios == pytest.approx(np.array([[1, 2], [1, 1], [1, 0.5], [1, 0.5]]), rel=0.01)
    assert figure.heading == "MoE layer 1"
    assert figure.caption == "In the end between 0.50 and 2.00 times an even load."
    assert svg.get("data-x").split()[:2] == ["10", "20"]


def test_idle_experts_are_counted_in_the_last_tenth(tmp_path):
    busy, idle = [0.5, 0.5, 0.0], [0.99, 0.01, 0.0]
    run = run_of(tmp_path, [{"step": s, "layers": {"load": [busy, idle if s > 9 else busy]}} for s in range(1, 11)])
    assert routing.idle_experts(run) == (3, 6)  # expert 2 of layer 1; experts 1 and 2 of layer 2
    assert "1 of 3 experts idle" in routing.load_maps(run)[0].caption
    assert "2 of 3 experts idle" in routing.load_maps(run)[1].caption


def test_one_record_is_a_map_of_one_column(tmp_path):
    (figure,) = routing.load_maps(run_of(tmp_path, [row(7)]))
    svg = ET.fromstring(figure.svg)
    assert (svg.get("data-columns"), svg.get("data-rows")) == ("1", "2")
    assert [float(v) for v in svg.get("data-x").split()[:2]] == [6, 8]


def test_the_number_of_cells_is_bounded(tmp_path):
    load = np.full((16, 256), 1 / 256)
    run = run_of(tmp_path, [{"step": s, "layers": {"load": load}} for s in range(60)])
    maps = routing.load_maps(run)
    cells = sum(int(ET.fromstring(f.svg).get("data-columns")) * 256 for f in maps)
    assert len(maps) == 16 and 100_000 < cells <= 200_000


def test_records_of_another_shape_are_left_out(tmp_path):
    run = run_of(tmp_path, [{"step": 1, "layers": {"load": [[1.0]]}}, row(2), row(3)])
    steps, load = routing.layer_array(run, "load")
    assert (steps, load.shape) == ([2, 3], (2, 1, 2))


def test_a_null_in_a_record_is_a_gap(tmp_path):
    run = run_of(tmp_path, [row(1, dropped=[0.1]), row(2, dropped=[None]), row(3, dropped=[0.3])])
    (series,) = routing.by_layer(run, "dropped", 100.0)
    assert series.y == pytest.approx([10.0, None, 30.0])


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (8, list(range(8))), (15, [0, 2, 4, 6, 8, 10, 12, 14])])
def test_many_layers_are_sampled_evenly(count, chosen):
    assert routing.chosen_layers(count) == chosen


@pytest.mark.parametrize("count", range(9, 100))
def test_the_first_and_the_last_layer_are_always_chosen(count):
    chosen = routing.chosen_layers(count)
    assert (chosen[0], chosen[-1], len(set(chosen))) == (0, count - 1, 8)


def test_drops_are_in_percent_by_layer_or_overall(tmp_path):
    by_layer = routing.drops(run_of(tmp_path / "a", [row(s, dropped=[0.1, 0.2]) for s in (1, 2)]))
    assert names(by_layer) == ["layer 1", "layer 2"]
    assert "% of assignments" in words(by_layer)
    overall = routing.drops(run_of(tmp_path / "b", [{"step": s, "dropped_fraction": 0.1} for s in (1, 2)]))
    assert names(overall) == ["all layers"]


def test_drops_by_position_average_the_last_quarter(tmp_path):
    rows = [row(s, dropped_by_position=[0.0, 0.5 if s > 6 else 0.1]) for s in range(1, 9)]
    figure = routing.drops_by_position(run_of(tmp_path, rows))
    assert figure.caption.startswith("Mean over steps 7 to 8.")
    titles = [title.text for title in ET.fromstring(figure.svg).iter(f"{NS}title")]
    assert titles == ["50"]  # in percent; the empty bin has no bar
    single = routing.drops_by_position(run_of(tmp_path / "one", rows[:1]))
    assert single.caption.startswith("At step 1.")


def test_entropy_has_that_of_an_even_router_as_its_reference(tmp_path):
    figure = routing.entropy(run_of(tmp_path, [row(s, entropy=[0.5]) for s in (1, 2)]))
    assert f"even: ln 2 = {math.log(2):.2f}" in words(figure)
    assert "nats" in words(figure)
    low, high, _ = (float(v) for v in ET.fromstring(figure.svg).get("data-y").split())
    assert low == 0 and high > math.log(2)


def test_entropy_without_records_has_no_reference(tmp_path):
    figure = routing.entropy(run_of(tmp_path, [{"step": s, "router_entropy": 1.0} for s in (1, 2)]))
    assert not any("even" in (word or "") for word in words(figure))


def test_gates_show_the_first_the_middle_and_the_last_record(tmp_path):
    rows = [row(100 * s, gate_histogram=[[1] * 20, [0] * 20]) for s in range(1, 16)]
    figure = routing.gates(run_of(tmp_path, rows))
    shown = words(figure)
    assert {"step 100", "step 800", "step 1,500", "layer 1", "layer 2", "gate value"} <= set(shown)
    assert len(list(ET.fromstring(figure.svg).iter(f"{NS}rect"))) == 3 * 20


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3)])
def test_few_records_make_few_columns(tmp_path, count, columns):
    run = run_of(tmp_path, [row(s, gate_histogram=[[1] * 20]) for s in range(1, count + 1)])
    assert sum((word or "").startswith("step") for word in words(routing.gates(run))) == columns


def test_balance_shows_what_the_rows_have(tmp_path):
    shown = routing.balance(run_of(tmp_path, train_rows(60, 2, 4)))
    assert [figure.heading for figure in shown] == ["Maximal violation", "Load-balance loss", "Router z"]
    assert "perfect balance" in words(shown[1])
    only = routing.balance(run_of(tmp_path / "b", [{"step": 1, "max_violation": 0.3}]))
    assert [figure.heading for figure in only] == ["Maximal violation"]


def test_attention_experts_have_load_maps_also_in_a_model_that_is_dense_otherwise(tmp_path):
    rows = [{"step": step, "layers": {"attention_load": [[0.75, 0.25]] * 2}} for step in (10, 20)]
    run = run_of(tmp_path, rows)
    assert routing.is_sparse(run)
    figures = routing.load_maps(run)
    assert [figure.heading for figure in figures] == ["Attention of layer 1", "Attention of layer 2"]
    assert figures[0].caption == "In the end between 0.50 and 1.50 times an even load."
    assert routing.idle_experts(run) is None
    both = [row | {"layers": row["layers"] | {"load": [[0.5, 0.5]]}} for row in rows]
    assert routing.load_maps(run_of(tmp_path, both))[0].heading == "MoE layer 1"
