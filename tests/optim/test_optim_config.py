"""The optimizer's options: what is refused, and that every choice builds."""

import jax.numpy as jnp
import pytest

from sparse_lm.config import ConfigError, from_dict
from sparse_lm.optim.build import apply, build_optimizer
from sparse_lm.optim.config import OptimConfig


@pytest.mark.parametrize(
    "key, value",
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("warmup_steps", -1),
        ("final_fraction", 1.5),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", 1.0),
        ("eps", 0.0),
        ("clip", 0.0),
        ("name", "adam"),
        ("schedule", "step"),
        ("state_dtype", "float16"),
    ],
)
def test_bad_values_are_refused_by_key(key, value):
    with pytest.raises(ConfigError) as caught:
        from_dict(OptimConfig, {key: value})
    assert caught.value.key == key


def test_adafactor_has_no_first_moment_to_be_narrow():
    with pytest.raises(ConfigError, match=r"config\.state_dtype='bfloat16': adafactor has no first moment"):
        OptimConfig(name="adafactor", state_dtype="bfloat16")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "rsqrt", "constant"])
def test_every_choice_builds(name, schedule):
    optimizer = build_optimizer(OptimConfig(name=name, schedule=schedule, clip=None), 100)
    params = {"up_DF": jnp.ones((2, 3))}
    new, _ = apply(optimizer, params, optimizer.init(params), params)
    assert bool(jnp.all(new["up_DF"] < 1))  # downhill
