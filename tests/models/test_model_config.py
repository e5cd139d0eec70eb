"""What a model's configuration accepts, refuses and derives."""

from __future__ import annotations

from typing import Any

import pytest

from sparse_lm.config import ConfigError, from_dict, to_dict
from sparse_lm.models.config import ModelConfig
from sparse_lm.moe.config import MoEConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"d_model": 10, "num_heads": 4}, r"config\.num_heads=4: must divide d_model=10, or set head_dim"),
        ({"num_heads": 4, "num_kv_heads": 3}, r"config\.num_kv_heads=3: must divide num_heads=4"),
        ({"num_kv_heads": 8}, r"config\.num_kv_heads=8"),
        ({"head_dim": 3}, r"config\.head_dim=3: rope rotates pairs"),
        ({"d_model": 12, "num_heads": 4}, r"config\.head_dim=3"),
        (
            {"d_model": 9, "num_heads": 1, "position": "sinusoidal"},
            r"config\.d_model=9: sinusoidal positions need an even width",
        ),
        (
            {"num_layers": 2, "moe": {"every": 3}},
            r"config\.moe\.every=3: leaves no layer of 2 sparse .*moe=None is dense",
        ),
        ({"num_layers": 2, "moe": {"every": 1, "first_dense": 2}}, r"config\.moe\.every=1.*first_dense=2"),
        ({"d_ff": 2, "moe": {"top_k": 4}}, r"config\.moe\.top_k=4: is more than d_ff=2; set moe\.d_expert"),
        ({"vocab_size": 1}, r"config\.vocab_size=1: must be at least 2"),
        ({"dropout": 1.0}, r"config\.dropout=1\.0"),
        ({"dtype": "float16"}, r"config\.dtype='float16'.*bfloat16, float32"),
        ({"remat": "some"}, r"config\.remat='some'.*known: dots, full, none, offload:NAMES, save:NAMES"),
        ({"moe": {"num_expert": 4}}, r"config\.moe\.num_expert=4: unknown key; did you mean 'num_experts'"),
    ],
)
def test_refusals_name_the_key_the_value_and_the_way_out(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        from_dict(ModelConfig, values)


@pytest.mark.parametrize(
    ("every", "first_dense", "expected"),
    [
        (1, 0, "TTTTT"),
        (2, 0, "FTFTF"),
        (2, 1, "FFTFT"),
        (1, 3, "FFFTT"),
        (5, 0, "FFFFT"),
    ],
)
def test_which_layers_are_sparse(every, first_dense, expected):
    config = ModelConfig(num_layers=5, moe=MoEConfig(every=every, first_dense=first_dense))
    assert config.sparse == tuple(letter == "T" for letter in expected)


def test_a_dense_model_has_no_sparse_layer():
    assert ModelConfig(num_layers=3).sparse == (False, False, False)


def test_derived_sizes():
    config = ModelConfig(d_model=24, num_heads=4, d_ff=100, moe=MoEConfig(top_k=3))
    assert (config.kv_heads, config.width, config.d_expert) == (4, 6, 33)
    other = config.replace(num_kv_heads=2, head_dim=16, moe__d_expert=7)
    assert (other.kv_heads, other.width, other.d_expert) == (2, 16, 7)


def test_odd_heads_are_fine_without_rotation():
    assert ModelConfig(head_dim=3, position="learned").width == 3


def test_round_trip_through_plain_dictionaries():
    config = ModelConfig(num_kv_heads=2, moe=MoEConfig(num_experts=16, top_k=2), remat="dots")
    assert from_dict(ModelConfig, to_dict(config)) == config
