"""Bounds of the options of training."""

from __future__ import annotations

import pytest

from sparse_lm import rules
from sparse_lm.config import ConfigError
from sparse_lm.train.config import CheckpointConfig, MeshConfig, ShardingConfig, TrainConfig

COUNTS = ("steps", "batch_size", "accumulate", "log_every", "eval_every", "eval_batches", "max_nonfinite")


@pytest.mark.parametrize("key", COUNTS)
def test_counts_start_at_one(key):
    assert getattr(TrainConfig(**{"batch_size": 16, key: 1}), key) == 1
    with pytest.raises(ConfigError, match=f"config.{key}=0: must be at least 1"):
        TrainConfig(**{key: 0})


def test_no_sample_is_allowed():
    assert TrainConfig(sample_tokens=0).sample_tokens == 0
    with pytest.raises(ConfigError, match="sample_tokens=-1"):
        TrainConfig(sample_tokens=-1)


@pytest.mark.parametrize("accumulate", [3, 5, 32])
def test_microbatches_divide_the_batch(accumulate):
    with pytest.raises(ConfigError, match=f"accumulate={accumulate}: must divide train.batch_size=16"):
        TrainConfig(batch_size=16, accumulate=accumulate)


def test_a_flight_of_microbatches_divides_them():
    assert TrainConfig(batch_size=16, accumulate=8, pipeline_microbatches=4).pipeline_microbatches == 4
    with pytest.raises(ConfigError, match=r"pipeline_microbatches=3: must divide train\.accumulate=8"):
        TrainConfig(batch_size=16, accumulate=8, pipeline_microbatches=3)


@pytest.mark.parametrize("key", ["every", "keep"])
def test_checkpoints_are_kept(key):
    with pytest.raises(ConfigError, match=f"config.{key}=0"):
        CheckpointConfig().replace(**{key: 0})


def test_a_mesh_takes_all_devices_by_default():
    assert MeshConfig() == MeshConfig(data=-1, fsdp=1, expert=1, model=1)
    with pytest.raises(ConfigError, match="expected int"):
        MeshConfig(data=None)  # type: ignore[arg-type]


def test_a_strategy_is_chosen_by_name_and_changed_by_axes():
    assert ShardingConfig().rules == rules.FSDP_EP
    assert ShardingConfig(strategy="zero1_ep").rules == rules.ZERO1_EP
    assert ShardingConfig(strategy="zero1_ep", state="fsdp").rules.state == ("fsdp",)
    assert ShardingConfig(stored="").rules == rules.EP
    assert ShardingConfig(dense="expert+context").rules.dense == ("expert", "context")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "fsdp"}, "config.strategy='fsdp': did you mean 'fsdp_ep'"),
        ({"state": "fsdp+dat"}, r"config.state='fsdp\+dat': 'dat' is no mesh axis; did you mean 'data'"),
        ({"stored": "expert"}, "with {'stored': .*'EDF' would use mesh axis .'expert'. twice"),
        ({"dense": "model"}, "with {'dense': .*'DF' would use mesh axis .'model'. twice"),
    ],
)
def test_strategies_that_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ShardingConfig(**changes)
