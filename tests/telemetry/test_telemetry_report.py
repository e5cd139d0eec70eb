"""The whole page for runs of every kind: valid XML, the right sections, the right numbers, a bounded size."""

# An element or attribute that is missing fails the test by itself.
# pyright: reportOptionalMemberAccess=false, reportArgumentType=false

import json
import re
import xml.etree.ElementTree as ET

import pytest
from telemetry_fake_run import info, train_rows, validation_rows, write_run

from sparse_lm.telemetry.report import render, state_sentence, write_report
from sparse_lm.telemetry.rundata import load_run, verdict
from sparse_lm.telemetry.sinks import MetricsFile

KINDS = {
    "sparse": (train_rows(300, 2, 8), validation_rows(300, 50), 300),
    "dense": (train_rows(300, 0, 0), validation_rows(300, 100, best=None), 300),
    "three rows": (train_rows(3, 2, 4), [], 1000),
    "one row": (train_rows(1, 1, 2), [], 10),
    "no rows": ([], [], 10),
    "validation only": ([], validation_rows(10, 5), 10),
    "wide": (train_rows(400, 6, 32), validation_rows(400, 100), 800),
    "all null": ([{"step": s, "split": "train", "loss": float("nan"), "max_violation": None} for s in (1, 2)], [], 2),
}


def parse(path):
    return ET.fromstring(path.read_text())


def text_of(root):
    return " ".join(" ".join(root.find("body").itertext()).split())


def headings(root):
    return [element.text for element in root.iter() if element.tag in ("h2", "h3")]


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_is_well_formed_self_contained_and_in_its_place(tmp_path, kind):
    path = write_report(write_run(tmp_path / kind, *KINDS[kind]))
    assert path == tmp_path / kind / "report.html"
    root = parse(path)
    assert root.find("body/h1").text == kind
    assert "nan" not in " ".join(e.get("d", "") + e.get("y", "") for e in root.iter())
    addresses = [e.get(name) for e in root.iter() for name in ("href", "src") if e.get(name)]
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["config.json", "metrics.jsonl", "report.html"] or (
        kind == "no rows"
    )


def test_a_sparse_run_has_all_its_sections(tmp_path):
    root = parse(write_report(write_run(tmp_path, *KINDS["sparse"])))
    assert headings(root) == [
        *("Loss", "Loss", "Validation loss by domain"),
        *("Routing", "Expert load", "MoE layer 1", "MoE layer 2", "Dropped assignments", "Drops by position"),
        *("Router entropy", "Gate values", "Maximal violation", "Load-balance loss", "Router z"),
        *("Optimization and throughput", "Learning rate", "Gradient norm", "Throughput", "Model FLOPs utilisation"),
        *("Configuration", "Model, data and machine"),
    ]


def test_a_dense_run_leaves_out_routing_with_a_sentence(tmp_path):
    root = parse(write_report(write_run(tmp_path, *KINDS["dense"])))
    text = text_of(root)
    assert "This is a dense run" in text
    assert "expert" not in text.split("Configuration")[0]
    assert not {"Dropped", "Imbalance", "Bits"} & {e.text for e in root.iter("span") if e.get("class") == "name"}


def tiles(root):
    found = [e for e in root.iter("div") if e.get("class") == "tile"]
    return {tile.find("span").text: (tile.find("b").text, tile.findall("span")[1].text) for tile in found}


def test_the_tiles_hold_the_bottom_line(tmp_path):
    train = [{"step": s, "split": "train", "loss": 3.0, "tokens_per_second": 12_345, "mfu": 0.4125} for s in (1, 2)]
    train[-1] |= {"dropped_fraction": 0.0123, "max_violation": 0.4}
    validation = [{"step": 2, "split": "validation", "loss": 2.5, "bits_per_byte": 0.9, "entropy_gap": 0.125}]
    assert tiles(parse(write_report(write_run(tmp_path, train, validation, 2)))) == {
        "Train loss": ("3.000", "nats / token, last row"),
        "Validation loss": ("2.500", "nats / token, step 2"),
        "Bits per byte": ("0.900", "validation, step 2"),
        "Above the best": ("0.125", "nats over the lowest possible loss"),
        "Throughput": ("12.3k", "tokens / s, last row"),
        "MFU": ("41.2%", "of the devices' FLOPs"),
        "Dropped": ("1.2%", "of assignments, last row"),
        "Imbalance": ("0.40", "busiest / mean load - 1"),
        "Parameters": ("12.3M", "4.57M active for a token"),
    }


def test_what_is_not_known_has_no_tile_or_a_dash(tmp_path):
    found = tiles(parse(write_report(write_run(tmp_path, *KINDS["three rows"]))))
    assert found["Validation loss"] == ("-", "nats / token, no validation yet")
    assert "Bits per byte" not in found and "Above the best" not in found


def test_a_dense_model_has_all_parameters_active(tmp_path):
    run_dir = write_run(tmp_path, *KINDS["dense"])
    config = info(300)
    config["parameters"]["active"] = config["parameters"]["total"]
    (run_dir / "config.json").write_text(json.dumps(config))
    assert tiles(parse(write_report(run_dir)))["Parameters"] == ("12.3M", "all active for a token")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("sparse", "Finished: 300 of 300 steps in 30s."),
        ("three rows", "Not finished: 3 of 1,000 steps in 0.3s."),
        ("no rows", "Not finished: 0 of 10 steps."),
    ],
)
def test_the_page_says_how_far_the_run_is(tmp_path, kind, words):
    run = load_run(write_run(tmp_path, *KINDS[kind]))
    assert state_sentence(run, verdict(run)).startswith(words)


def test_trouble_is_said_at_the_top(tmp_path):
    train = train_rows(20, 2, 4)
    train[-1]["nonfinite_steps"] = 3
    run = load_run(write_run(tmp_path, train, [], 20))
    sentence = state_sentence(run, verdict(run))
    assert "3 steps had a loss or gradient that was not finite" in sentence
    assert "Idle experts (under a tenth of an even load): 1 of 8." in sentence


def test_without_idle_experts_all_are_in_use(tmp_path):
    rows = [{"step": 1, "split": "train", "layers": {"load": [[0.5, 0.5]]}}]
    run = load_run(write_run(tmp_path, rows, [], 1))
    assert state_sentence(run, verdict(run)) == "Finished: 1 of 1 steps. All 2 experts are in use."


def test_a_config_without_steps_still_says_where_the_run_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    MetricsFile(tmp_path / "metrics.jsonl").append({"step": 1234, "loss": 1.0})
    text = text_of(parse(write_report(tmp_path)))
    assert "1,234 steps." in text
    assert "config.json holds no configuration." in text


def test_all_text_is_escaped(tmp_path):
    evil = "<img src=x onerror=alert(1)>"
    run_dir = write_run(tmp_path / "a&b", [], validation_rows(10, 5, [evil, "</svg><script>"]), 10)
    config = info(10)
    config["config"][evil] = {evil: evil}
    config["git"] = {"commit": evil}
    config["parameters"][evil] = 3
    (run_dir / "config.json").write_text(json.dumps(config))
    html = write_report(run_dir).read_text()
    assert evil not in html and "<img" not in html
    assert html.count("<script") == 1
    root = ET.fromstring(html)
    assert root.find("head/title").text == "a&b - sparse_lm"
    assert evil in text_of(root)


def test_every_config_value_is_there_in_closed_groups(tmp_path):
    root = parse(write_report(write_run(tmp_path, *KINDS["sparse"])))
    groups = {d.find("summary").text: d for d in root.iter("details")}
    assert {"general", "train", "model", "mesh", "data", "device", "versions", "git"} <= set(groups)
    assert all(group.get("open") is None for group in groups.values())
    cells = [cell.text for cell in groups["model"].iter("td")]
    assert {"moe.kind", "top_k", "moe.balance", "off"} <= set(cells)
    parameters = [[cell.text for cell in row] for row in root.iter("tr")]
    assert ["flops per token", "27,407,340"] in parameters


def test_the_domain_table_shows_first_last_and_change(tmp_path):
    rows = [
        {"step": step, "split": "validation", "loss": 1.0, "losses_by_domain": losses}
        for step, losses in ((5, {"a": 3.0}), (1000, {"a": 2.5, "b": 4.0}))
    ]
    root = parse(write_report(write_run(tmp_path, [], rows, 10)))
    shown = [[cell.text for cell in row] for row in root.iter("tr")]
    assert ["domain", "step 5", "step 1,000", "change"] in shown
    assert ["a", "3.000", "2.500", "-0.500"] in shown
    assert ["b", "-", "4.000", "-"] in shown


def test_scalars_without_per_layer_records_are_enough(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "layers"} for row in train_rows(30, 2, 4)]
    root = parse(write_report(write_run(tmp_path, rows, [], 30)))
    assert "No row with per-layer statistics yet" in text_of(root)
    assert {"Dropped assignments", "Router entropy", "Maximal violation"} <= set(headings(root))


def test_all_axes_are_named(tmp_path):
    root = parse(write_report(write_run(tmp_path, *KINDS["sparse"])))
    charts = [e for e in root.iter("{http://www.w3.org/2000/svg}svg") if e.get("data-kind")]
    assert len(charts) >= 10
    for chart in charts:
        words = [t.text for t in chart.iter("{http://www.w3.org/2000/svg}text")]
        assert all(words)
        assert sum(bool(re.search("[a-z%]{2,}|%", word or "")) for word in words) >= 2, chart.get("aria-label")


def test_a_page_can_be_written_again_while_the_run_goes_on(tmp_path):
    run_dir = write_run(tmp_path, train_rows(5, 0, 0), [], 10)
    before = write_report(run_dir).read_text()
    with (run_dir / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"step": 6, "split": "train", "loss": 1.0}) + '\n{"step": 7, "los')
    after = write_report(run_dir).read_text()
    assert "5 of 10 steps" in before and "6 of 10 steps" in after


def test_the_same_run_gives_the_same_page(tmp_path):
    run_dir = write_run(tmp_path, *KINDS["sparse"])
    assert render(load_run(run_dir)) == render(load_run(run_dir))


def test_long_runs_and_many_experts_stay_under_a_megabyte_and_a_half(tmp_path):
    train = [
        {"step": s, "split": "train", "loss": 2 + s % 7, "gradient_norm": 1 + s % 5, "tokens_per_second": 1000 + s % 99}
        for s in range(1, 100_001)
    ]
    for layers in train_rows(100, 12, 128):
        train[1000 * layers["step"] - 1] |= {key: layers[key] for key in ("layers", "max_violation", "load_balance")}
    run_dir = write_run(tmp_path, train, validation_rows(100_000, 500), 100_000)
    assert write_report(run_dir).stat().st_size < 1.5e6


def test_errors_of_a_damaged_run_reach_the_caller_and_leave_the_old_page(tmp_path):
    run_dir = write_run(tmp_path, train_rows(3, 0, 0), [], 3)
    before = write_report(run_dir).read_text()
    (run_dir / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1"):
        write_report(run_dir)
    assert (run_dir / "report.html").read_text() == before
