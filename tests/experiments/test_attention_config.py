"""configs/attention_experts.py: what its variants are, and that they cost what their docstring says."""

from pathlib import Path

import pytest

from sparse_lm.config import from_dict, python_file
from sparse_lm.experiment import Experiment
from sparse_lm.models.counts import count
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.attention.switch_head import SwitchHead

FILE = Path(__file__).resolve().parents[2] / "configs" / "attention_experts.py"


def model_of(variant: str):
    module = python_file(FILE)
    assert module is not None
    experiment = from_dict(Experiment, module.get_config(variant))
    assert experiment.mesh_sizes(1)["expert"] == 1
    return experiment.model


def test_the_variants():
    both, attention, switch = (model_of(name) for name in ("both", "attention", "switch_head"))
    assert isinstance(both.attention, Mixture) and both.moe is not None and all(both.sparse)
    assert attention == both.replace(moe=None)
    assert isinstance(switch.attention, SwitchHead) and switch.moe is None and switch.kv_heads == switch.num_heads


def test_the_twin_has_the_flops_of_both_but_for_the_routers():
    sparse, dense = (count(model_of(name).replace(vocab_size=264)) for name in ("both", "dense"))
    routers = sparse.router.multiplied + 4 * 128 * 8
    assert sparse.flops_per_token(128) - 6 * routers == dense.flops_per_token(128)
    assert dense.total == dense.active < sparse.total


def test_an_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="the variants are both, attention"):
        model_of("jetmoe")
