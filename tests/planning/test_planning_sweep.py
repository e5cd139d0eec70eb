"""Tables of plans: how axes are written, what stands in the rows, and the three files."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ElementTree

import pytest
import tiny

from sparse_lm.config import ConfigError
from sparse_lm.planning.plan import plan_topology, resolve
from sparse_lm.planning.sweep import COLUMNS, parse_sweep, sweep, to_csv, to_markdown, to_svg, write


@pytest.fixture(scope="module")
def rows():
    config = resolve(tiny.experiment(model__dropout=0.0, model__moe__d_expert=12, mesh__data=-1))
    axes = parse_sweep("num_experts=4,8 top_k=1,2 mesh.expert=2,8 topology=v5e:2x4,h100:8")
    return sweep(config, axes, lambda changed, topology: plan_topology(changed, topology, compile_step=False))


def test_axes_are_keys_with_values():
    assert parse_sweep("num_experts=8,64 mesh.expert=4 topology=v5e:4x4,v5p:2x2x4 model.remat=full,none") == (
        ({"model.moe.num_experts": 8}, {"model.moe.num_experts": 64}),
        ({"mesh.expert": 4},),
        ({"topology": "v5e:4x4"}, {"topology": "v5p:2x2x4"}),
        ({"model.remat": "full"}, {"model.remat": "none"}),
    )
    assert parse_sweep("capacity_factor=1.25,None") == (
        ({"model.moe.capacity_factor": 1.25}, {"model.moe.capacity_factor": None}),
    )


def test_keys_that_are_joined_change_together():
    assert parse_sweep("top_k=1,2 topology+train.batch_size=v5e:2x4+8,v5e:4x4+16") == (
        ({"model.moe.top_k": 1}, {"model.moe.top_k": 2}),
        ({"topology": "v5e:2x4", "train.batch_size": 8}, {"topology": "v5e:4x4", "train.batch_size": 16}),
    )
    seen = []

    def planner(changed, topology):
        seen.append((topology, changed.train.batch_size))
        return plan_topology(changed, topology, compile_step=False)

    sweep(resolve(tiny.experiment()), parse_sweep("topology+train.batch_size=v5e:2x4+8,v5e:4x4+16"), planner)
    assert seen == [("v5e:2x4", 8), ("v5e:4x4", 16)]


@pytest.mark.parametrize("text", ["num_experts", "=4", "num_experts=", "", "top_k+mesh.expert=1+2,1"])
def test_what_is_no_axis_is_refused(text):
    with pytest.raises(ConfigError, match="sweep"):
        parse_sweep(text)


def test_every_combination_is_a_row(rows):
    assert len(rows) == 2 * 2 * 2 * 2
    first, second = rows[0].setting, rows[1].setting
    assert first == {"model.moe.num_experts": 4, "model.moe.top_k": 1, "mesh.expert": 2, "topology": "v5e:2x4"}
    assert second == {**first, "topology": "h100:8"}


def test_what_the_configuration_refuses_says_why(rows):
    refused = [row for row in rows if row.plan is None]
    assert {(row.setting["model.moe.num_experts"], row.setting["mesh.expert"]) for row in refused} == {(4, 8)}
    assert all("must be a multiple of mesh.expert=8" in row.refused for row in refused)


def test_an_unknown_key_is_a_row_that_names_it():
    [row] = sweep(resolve(tiny.experiment()), parse_sweep("num_expert=4"), lambda changed, topology: pytest.fail())
    assert row.plan is None and "num_expert" in row.refused


def test_more_experts_are_more_bytes_and_an_expert_axis_fewer(rows):
    peak = {tuple(row.setting.values()): row.plan.peak for row in rows if row.plan}
    assert peak[8, 1, 2, "v5e:2x4"] > peak[4, 1, 2, "v5e:2x4"]
    assert peak[8, 1, 8, "v5e:2x4"] < peak[8, 1, 2, "v5e:2x4"]


def test_the_csv_has_the_numbers_of_the_plans(rows):
    table = list(csv.DictReader(io.StringIO(to_csv(rows))))
    assert list(table[0]) == [*rows[0].setting, *COLUMNS]
    for line, row in zip(table, rows, strict=True):
        assert line["topology"] == row.setting["topology"]
        if row.plan is None:
            assert line["refused"] == row.refused and line["fits"] == ""
        else:
            assert float(line["GB_per_device"]) == pytest.approx(row.plan.peak / 1e9, abs=0.005)
            assert (line["fits"], line["source"], line["compile_s"]) == ("yes", "estimated", "")
            assert float(line["communication_ms"]) == pytest.approx(1e3 * row.plan.roofline.communication, abs=0.05)
            assert float(line["executed_over_model_flops"]) == pytest.approx(row.plan.overhead, abs=5e-4)


def test_the_markdown_has_as_many_columns_everywhere(rows):
    lines = to_markdown(rows).splitlines()
    assert len(lines) == len(rows) + 2
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0].startswith("| num_experts | top_k | mesh.expert | topology | GB_per_device |")


def test_the_plot_has_a_line_per_combination_and_the_memories(rows):
    svg = to_svg(rows)
    ElementTree.fromstring(svg)
    assert svg.count('class="series"') == 8  # top_k, mesh.expert and topology
    assert "memory of v5e" in svg and "memory of h100" in svg


def test_a_plot_needs_an_axis_with_numbers(rows):
    words = [type(row)({"topology": row.setting["topology"]}, row.plan) for row in rows]
    with pytest.raises(ConfigError, match="no axis has numbers"):
        to_svg(words)


def test_the_three_files_are_written(rows, tmp_path):
    write(rows, tmp_path / "new" / "plans")
    written = {path.name: path.read_text() for path in (tmp_path / "new" / "plans").iterdir()}
    assert written == {"plan.csv": to_csv(rows), "plan.md": to_markdown(rows), "plan.svg": to_svg(rows)}
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out"):
        write(rows, tmp_path / "file")
