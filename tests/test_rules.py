"""What each named strategy cuts, of weights and of optimizer state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from sparse_lm.rules import STRATEGIES

# What is stored of up_EDF, of a dense up_DF, of the up-projection of latent keys, and of the optimizer state of up_DF.
STORED = {
    "ep": (P("expert", None, "model"), P(None, "model"), P(None, "model", None), P(None, "model")),
    "zero1_ep": (P("expert", None, "model"), P(None, "model"), P(None, "model", None), P(("fsdp", "data"), "model")),
    "fsdp_ep": (P("expert", "fsdp", "model"), P("fsdp", "model"), P("fsdp", "model", None), P("fsdp", "model")),
    "hybrid_ep": (
        P("expert", "fsdp", "model"),
        P("fsdp", "model"),
        P("fsdp", "model", None),
        P(("fsdp", "data"), "model"),
    ),
    "fsdp_over_ep": (
        P("expert", "fsdp", "model"),
        P(("fsdp", "expert"), "model"),
        P(("fsdp", "expert"), "model", None),
        P(("fsdp", "expert"), "model"),
    ),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_store(name):
    rules = STRATEGIES[name]
    found = (rules.param("EDF"), rules.param("DF"), rules.param("PHI"), rules.for_state.param("DF"))
    assert found == STORED[name]
    assert [rules.gathered(letters) for letters in ("DF", "PHI")] == [P(None, "model"), P(None, "model", None)]


def test_what_does_not_divide_stays_whole(mesh_of):
    with jax.set_mesh(mesh_of(data=4, fsdp=2)):
        state = STRATEGIES["zero1_ep"].for_state.shard_parameters(
            {"up_DF": jnp.ones((4, 3)), "down_FD": jnp.ones((3, 3))}
        )
    assert jax.typeof(state["up_DF"]).sharding.spec == P("fsdp", "model")
    assert jax.typeof(state["down_FD"]).sharding.spec == P("model", None)
