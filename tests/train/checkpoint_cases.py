"""Trees, saves and expectations that the tests of checkpoints share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_lm.train.checkpoint import Checkpoints
from sparse_lm.train.config import CheckpointConfig
from sparse_lm.train.manifest import CheckpointError

EVERY = CheckpointConfig(every=1, keep=100, best=False)


def tree_of(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "params": {
            "up_EDF": jnp.asarray(rng.normal(size=(8, 4, 16)), jnp.float32),
            "out_FD": jnp.asarray(rng.normal(size=(16, 8)), jnp.bfloat16),
        },
        "opt_state": (jnp.asarray(seed, jnp.int32), [None, jnp.asarray(rng.normal(size=(3,)), jnp.float32)]),
    }


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def assert_same(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def save(directory, steps=(1,), config=EVERY, losses=None):
    with Checkpoints(directory, config) as checkpoints:
        for step in steps:
            checkpoints.save(step, tree_of(step), {"step": step}, loss=(losses or {}).get(step))
    return directory


def refused(kind, match, action, *args, **kwargs):
    with pytest.raises(CheckpointError, match=match) as caught:
        action(*args, **kwargs)
    assert caught.value.kind == kind
    return caught.value
