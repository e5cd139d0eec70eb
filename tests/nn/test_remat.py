"""Rematerialisation by name: what the words mean, and what a compiled model then computes again."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from sparse_lm.config import ConfigError
from sparse_lm.models.config import ModelConfig
from sparse_lm.models.decoder import Decoder
from sparse_lm.moe.config import MoEConfig
from sparse_lm.nn.remat import NAMES, named, policy
from sparse_lm.sharding import DEFAULT

ALL = ",".join(NAMES)
TOKENS_BL = jnp.ones((2, 16), jnp.int32)


@functools.cache
def step(remat: str, dispatcher: str = "gather", scan_layers: bool = True):
    """FLOPs of the compiled loss and gradients of two layers of one kind; loss and gradients."""
    factor = None if dispatcher == "dropless" else 1.25
    moe = MoEConfig(4, 2, dispatcher=dispatcher, capacity_factor=factor, capacity_factor_eval=factor, num_shared=1)
    sizes = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 64, "vocab_size": 8}
    config = ModelConfig(remat=remat, scan_layers=scan_layers, moe=moe, **sizes)
    model = Decoder(jax.random.key(0), config, DEFAULT)

    def loss(model):
        return jnp.mean(jnp.square(model(TOKENS_BL, TOKENS_BL, TOKENS_BL, jax.random.key(1))[0]))

    compiled = jax.jit(jax.value_and_grad(loss)).lower(model).compile()
    cost = compiled.cost_analysis()
    assert cost is not None
    return cost["flops"], jax.tree.leaves(compiled(model))


def saved(capsys, remat: str) -> list[str]:
    """What the backward pass of three named steps keeps, beside its arguments."""

    def function(x):
        for name in ("router", "dispatch", "combine"):
            x = named(jnp.sin(x), name)
        return x

    keep = policy(remat)
    print_saved_residuals(jax.checkpoint(function, policy=keep) if keep else function, 1.0)
    return [line for line in capsys.readouterr().out.splitlines() if "from the argument" not in line]


def test_none_is_no_policy_and_full_keeps_nothing(capsys):
    assert policy("none") is None
    assert saved(capsys, "full") == []
    assert len(saved(capsys, "none")) == 3


@pytest.mark.parametrize(
    ("remat", "kept"), [("save:router", ["router"]), ("save:router,dispatch", ["router", "dispatch"])]
)
def test_named_values_are_kept_and_others_are_not(capsys, remat, kept):
    lines = saved(capsys, remat)
    assert len(lines) == len(kept)
    assert all(f"named '{name}'" in line for name, line in zip(kept, lines, strict=True))


def test_offloaded_values_go_to_the_host():
    keep = policy("save:router+offload:dispatch")

    def function(x):
        return jnp.sin(named(jnp.sin(named(jnp.sin(x), "router")), "dispatch"))

    jaxpr = str(jax.make_jaxpr(jax.grad(jax.checkpoint(function, policy=keep)))(1.0))
    assert jaxpr.count("device_put") == 2  # there and back
    assert "host" in jaxpr.lower()


@pytest.mark.parametrize(
    ("remat", "message"),
    [
        ("some", r"config\.remat='some'.*known: dots, full, none, offload:NAMES, save:NAMES"),
        ("save", r"did you mean 'save:NAMES'"),
        ("save:", r"no values are named ''"),
        ("save:expert_hiden", r"no values are named 'expert_hiden'; did you mean 'expert_hidden'\?"),
        ("save:router+keep:qkv", r"known: .*with a \+ between"),
        ("save:router,qkv+offload:qkv", r"'qkv' stands twice; name it once"),
        ("full+save:qkv", r"known: "),
    ],
)
def test_what_cannot_be_understood_is_refused(remat, message):
    with pytest.raises(ConfigError, match=message):
        policy(remat)
    with pytest.raises(ConfigError, match=message):
        ModelConfig(remat=remat)


PRODUCTS = ("qkv", "attention", "mlp_hidden", "router", "expert_hidden", "expert_out")


def assert_same_gradients(got, expected):
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", [n if n == "expert_hidden" else pytest.param(n, marks=pytest.mark.slow) for n in PRODUCTS]
)
def test_what_is_kept_is_not_computed_again(name):
    """Every name alone saves the FLOPs of products; the loss and the gradients are the same."""
    flops, values = step(f"save:{name}")
    again, expected = step("full")
    assert flops < again
    assert_same_gradients(values, expected)


def test_all_names_together_cost_little_more_than_keeping_everything():
    none, full, every = (step(remat) for remat in ("none", "full", f"save:{ALL}"))
    assert none[0] < every[0] < none[0] + 0.4 * (full[0] - none[0])
    assert_same_gradients(every[1], none[1])
    assert_same_gradients(full[1], none[1])


def test_experts_save_what_their_products_cost():
    """At least the two products of gated experts with R rows; XLA counts the body of the loop over layers once."""
    rows, width, hidden = 4 * 2 * 10, 8, 32  # experts x groups x slots: ceil(1.25 * 2 * 16 / 4)
    saving = step("full")[0] - step("save:expert_hidden")[0]
    products = 2 * 2 * rows * width * hidden
    assert products <= saving < 2 * products


def test_offloading_changes_nothing_but_the_place():
    assert_same_gradients(step("offload:expert_hidden,attention")[1], step("none")[1])


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", ["dense", "einsum", "dropless"])
@pytest.mark.parametrize("scan_layers", [True, False], ids=["scanned", "unrolled"])
def test_every_dispatcher_has_the_names(dispatcher, scan_layers):
    full, names = (step(remat, dispatcher, scan_layers) for remat in ("full", f"save:{ALL}"))
    assert names[0] < full[0]
    assert_same_gradients(names[1], full[1])
    assert_same_gradients(names[1], step("none", dispatcher, scan_layers)[1])
