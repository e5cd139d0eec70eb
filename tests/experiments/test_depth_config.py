"""The configuration of Mixture of Depths: every variant resolves, and the dense one costs what the others cost."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparse_lm.config import from_dict, python_file
from sparse_lm.experiment import Experiment, resolved
from sparse_lm.models.counts import count

FILE = Path(__file__).resolve().parents[2] / "configs" / "mixture_of_depths.py"


def variant(name: str) -> Experiment:
    module = python_file(FILE)
    assert module is not None
    return resolved(from_dict(Experiment, module.get_config(name)), 264)


@pytest.mark.parametrize("name", ["router", "mlp", "moe"])
def test_half_of_the_blocks_are_wrapped(name):
    experiment = variant(name)
    assert [kind.wrapped for kind in experiment.model.layers] == [False, True, False, True]
    assert experiment.model.depth is not None and experiment.model.depth.slots(experiment.data.length) == 16
    assert experiment.mesh_sizes(8)["data"] == 8
    assert (experiment.model.depth.predictor == "mlp") == (name == "mlp")
    assert any(kind.sparse and kind.wrapped for kind in experiment.model.layers) == (name == "moe")


def test_the_twin_has_the_same_flops_without_skipping():
    twin, model = variant("dense"), variant("router")
    assert twin.model.depth is None
    length = model.data.length
    assert count(twin.model).flops_per_token(length) == pytest.approx(
        count(model.model).flops_per_token(length), rel=0.02
    )
    assert twin.replace(model=model.model) == model


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match="the variants are router, mlp, moe, dense"):
        variant("sparse")
