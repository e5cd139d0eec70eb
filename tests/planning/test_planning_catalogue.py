"""The table of published models: numbers in words, what publishers leave out, and folders that are none."""

from __future__ import annotations

from pathlib import Path

import mains
import pytest

from sparse_lm.config import ConfigError
from sparse_lm.planning import record
from sparse_lm.planning.catalogue import COLUMNS, NEEDS, catalogue, chosen, published_number, short, to_markdown
from sparse_lm.planning.plan import plan_topology

ROOT = Path(__file__).resolve().parents[2]
FILE = '''"""A small model."""

from sparse_lm.config import to_config_dict
from sparse_lm.experiment import Experiment
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig
from sparse_lm.train.config import MeshConfig

PUBLISHED = {TABLE}


def get_config(variant="none"):
    moe = MoEConfig(num_experts=8, top_k=2, every=1, d_expert=64)
    model = ModelConfig(vocab_size=512, num_layers=2, d_model=64, num_heads=2, d_ff=64, moe=moe)
    model = model.replace(tie_embeddings=variant == "tied")
    return to_config_dict(Experiment(model=model, mesh=MeshConfig(expert=4)))
'''


def write(folder: Path, table: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "small.py").write_text(FILE.replace("{TABLE}", table))
    return folder


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    table = '{"tied": ("1M", "", "v5e:2x4"), "untied": ("0.3M", "0.1M", "v5p:2x2x2")}'
    return catalogue(write(tmp_path_factory.mktemp("catalogue"), table))


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (145_312_000, "145.3M"),
        (46_702_792_704, "46.70B"),
        (671_026_000_000, "671.0B"),
        (1_571_120_000_000, "1.571T"),
        (999_000, "0.9990M"),
    ],
)
def test_a_number_has_four_digits(number, text):
    assert short(number) == text


@pytest.mark.parametrize(
    ("text", "value", "unit"), [("145M", 145e6, 1e6), ("46.7B", 46.7e9, 1e8), ("1.04T", 1.04e12, 1e10)]
)
def test_what_is_published_has_a_last_digit(text, value, unit):
    assert published_number(text) == pytest.approx((value, unit))


@pytest.mark.parametrize("text", ["46.7", "", "46.7G", "manyB"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match=r"no published number|could not convert"):
        published_number(text)


def test_names_are_the_file_and_the_variant(entries, tmp_path):
    assert [entry.name for entry in entries] == ["small:tied", "small:untied"]
    assert [entry.experiment.model.tie_embeddings for entry in entries] == [True, False]
    (only,) = catalogue(write(tmp_path / "one", '{"": ("1M", "1M", "v5e:2x4")}'))
    assert only.name == "small"


def test_only_a_table_that_is_not_multiplied_is_left_out(entries):
    # Per layer: attention 4 x 64^2, eight experts of 3 x 64^2, a router of 64 x 8, two norms; then the last norm.
    per_layer, table = (4 + 8 * 3) * 64**2 + 64 * 8 + 2 * 64, 512 * 64
    total = 2 * per_layer + 64 + table
    active = total - 2 * 6 * 3 * 64**2
    tied, untied = entries
    assert tied.counts() == (total, active, active)
    assert untied.counts() == (total + table, active + table, active)


def test_cells_stand_beside_what_is_published(entries):
    tied, untied = (dict(zip(COLUMNS, entry.cells(), strict=True)) for entry in entries)
    assert tied["configuration"] == "small:tied"
    assert entries[0].cells()[1:3] == ("0.2635M", "1M") and entries[0].cells()[5] == "-"
    assert untied["active"] == "0.1488M" and untied["without input table"] == "0.1160M"


def needs(entry, found=None):
    return dict(zip(NEEDS, entry.needs(found), strict=True))


def test_the_tables_have_every_model_and_estimates_of_every_slice(entries):
    counts, plans = (table.splitlines() for table in to_markdown(entries, {}).strip().split("\n\n"))
    for (head, rule, *rows), columns in ((counts, COLUMNS), (plans, NEEDS)):
        assert [cell.strip() for cell in head.strip("|").split("|")] == list(columns)
        assert set(rule) == {"|", " ", "-"}
        assert [row.split("|")[1].strip() for row in rows] == ["small:tied", "small:untied"]
    row = needs(entries[0])
    assert (row["slice"], row["mesh"], row["in use GB"]) == ("v5e:2x4", "data=2 x expert=4", "-")
    assert (row["fits"], row["compiled in"]) == ("yes", "estimated")


def test_a_compiled_plan_stands_in_the_row(entries):
    plan = plan_topology(entries[0].experiment, entries[0].topology, compile_step=False)
    values = record.describe(plan, entries[0].experiment, entries[0].topology)
    values |= {"compiled": {"seconds": 83.4}, "source": "compiled", "peak": 12_340_000_000, "fits": False}
    row = needs(entries[0], values)
    assert (row["in use GB"], row["fits"], row["compiled in"]) == ("12.3", "no", "1m23s")
    assert row["estimated GB"] == f"{plan.estimated_peak / 1e9:.1f}"
    values |= {"compiled": {"seconds": 3.0, "message": "too large", "needed": None}, "source": "estimated"}
    row = needs(entries[0], values)
    assert (row["in use GB"], row["fits"], row["compiled in"]) == ("-", "no", "given up: 3.0s")


def test_models_are_chosen_by_name_and_a_wrong_one_is_told(entries):
    assert chosen(entries, []) == entries
    assert chosen(entries, ["small:untied"]) == entries[1:]
    with pytest.raises(ConfigError, match=r"only='small:unted'.*did you mean.*small:untied"):
        chosen(entries, ["small:unted"])


def test_a_step_is_lowered_for_all_devices_without_any(entries):
    text = entries[0].lowered().as_text()
    assert "mhlo.num_partitions = 8 : i32" in text and "512x64xf32" in text


def test_a_folder_without_published_models_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no configurations"):
        catalogue(tmp_path)
    (tmp_path / "plain.py").write_text('"""Nothing."""\n')
    with pytest.raises(ConfigError, match=r"plain.py'.*no table PUBLISHED; write PUBLISHED = "):
        catalogue(tmp_path)


def test_the_main_prints_the_tables_and_names_a_wrong_folder(entries, tmp_path):
    folder = write(tmp_path / "one", '{"tied": ("1M", "", "v5e:2x4")}')
    arguments = "--nocompile", f"--out={tmp_path / 'out'}"
    status, out, err = mains.call("plan_all", f"--folder={folder}", *arguments)
    assert (status, out, err) == (0, to_markdown(entries[:1], {}), "")
    status, _, err = mains.call("plan_all", f"--folder={tmp_path / 'none'}", *arguments)
    assert status == 2 and "has no configurations" in err and "Traceback" not in err


def test_the_documented_table_is_todays():
    """Of the counts; what was compiled is of its day."""
    text = (ROOT / "docs" / "plans.md").read_text()
    for entry in catalogue(ROOT / "configs" / "paper"):
        assert f"| {' | '.join(entry.cells())} |\n" in text, (
            f"{entry.name}: run `make plan-all` and put the table there"
        )
