"""Random bits on CPUs are those of JAX, in the form that compiles well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.random import threefry2x32_p

from sparse_lm.threefry import threefry


# The known answers of Random123 (tests/kat_vectors): key, counter, result.
@pytest.mark.parametrize(
    ("key", "counter", "result"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_known_answers(key, counter, result):
    words = [jnp.uint32(word) for word in (*key, *counter)]
    assert tuple(int(word) for word in threefry(*words)) == result
    assert tuple(int(word) for word in jax.jit(threefry2x32_p.bind)(*words)) == result
    assert tuple(int(word) for word in threefry2x32_p.bind(*words)) == result


def test_keys_and_counters_broadcast():
    keys = jnp.arange(3, dtype=jnp.uint32)[:, None]
    counters = jnp.arange(5, dtype=jnp.uint32)[None]
    x, y = threefry2x32_p.bind(keys, keys + 7, counters, counters * 3)
    for i in range(3):
        for j in range(5):
            one = threefry(jnp.uint32(i), jnp.uint32(i + 7), jnp.uint32(j), jnp.uint32(3 * j))
            assert (int(x[i, j]), int(y[i, j])) == tuple(int(word) for word in one)


def test_draws_are_those_of_plain_jax():
    """What JAX 0.10.2 draws without this package: seeds mean the same as ever."""
    bits = jax.random.bits(jax.random.key(0), (4,))
    np.testing.assert_array_equal(bits, np.uint32([4070199207, 4202968722, 1427181096, 2012915765]))
    split = jax.random.key_data(jax.random.split(jax.random.key(3), 2))
    np.testing.assert_array_equal(split, np.uint32([[3716834203, 3481239269], [1946498123, 2217676430]]))
    folded = jax.random.key_data(jax.random.fold_in(jax.random.key(3), 5))
    np.testing.assert_array_equal(folded, np.uint32([2464363587, 131619366]))


def test_programs_for_cpus_have_no_loop():
    text = jax.jit(lambda key: jax.random.bits(key, (64, 64))).lower(jax.random.key(0)).as_text()
    assert "while" not in text
    assert text.count("stablehlo.xor") > 20
