"""What a parameter's name says about it."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sparse_lm.optim.groups import decay_mask, decays, letters, parameter_name, stacking_axes


class _Experts(nnx.Module):
    def __init__(self):
        self.up_EDF = nnx.Param(jnp.zeros((3, 4, 2, 5)))
        self.bias_EF = nnx.Param(jnp.zeros((3, 4, 5)))


class _Model(nnx.Module):
    def __init__(self):
        self.table_VD = nnx.Param(jnp.zeros((7, 2)))
        self.experts = _Experts()


def _path(name):
    (path, _), *_ = jax.tree_util.tree_flatten_with_path({name: 0})[0]
    return path


def test_names_in_a_flax_state():
    _, params, _ = nnx.split(_Model(), nnx.Param, ...)
    names = [parameter_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    assert sorted(names) == ["bias_EF", "table_VD", "up_EDF"]


def test_names_in_a_module_used_as_a_pytree():
    names = [parameter_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(_Model())[0]]
    assert sorted(names) == ["bias_EF", "table_VD", "up_EDF"]


def test_name_of_a_bare_array_is_empty():
    assert parameter_name(()) == ""


@pytest.mark.parametrize(
    "name, axes", [("up_EDF", "EDF"), ("scale_D", "D"), ("query_norm_scale_I", "I"), ("up_NEDF", "EDF")]
)
def test_letters(name, axes):
    assert letters(_path(name)) == axes


@pytest.mark.parametrize("name", ["kernel", "up_DZ", "up_", "_D", "up_edf"])
def test_letters_refuses_names_that_do_not_say_their_axes(name):
    with pytest.raises(ValueError, match=rf"parameter '{name}' does not say its axes; end its name.*known: B, L"):
        letters(_path(name))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("up_EDF", True),
        ("down_FD", True),
        ("query_DHI", True),
        ("out_HID", True),
        ("gate_NEDF", True),
        ("scale_D", False),
        ("scale_HI", False),
        ("query_norm_scale_HI", False),
        ("bias_F", False),
        ("bias_EF", False),
        ("query_bias_HI", False),
        ("table_VD", False),
        ("table_LD", False),
        ("head_DV", False),
        ("router_DE", False),
        ("temperature_E", False),
        ("rescale_DF", True),
    ],
)
def test_decays(name, expected):
    assert decays(_path(name)) is expected


def test_mask_has_the_structure_of_the_parameters():
    _, params, _ = nnx.split(_Model(), nnx.Param, ...)
    mask = decay_mask(params)
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    flat = {parameter_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(mask)[0]}
    assert flat == {"up_EDF": True, "bias_EF": False, "table_VD": False}


@pytest.mark.parametrize(
    "name, ndim, expected",
    [
        ("up_EDF", 4, 2),
        ("up_EDF", 3, 1),
        ("bias_EF", 3, 2),
        ("router_DE", 3, 1),
        ("router_DE", 2, 0),
        ("table_VD", 2, 0),
        ("scale_D", 2, 1),
        ("temperature_E", 1, 0),
    ],
)
def test_stacking_axes(name, ndim, expected):
    assert stacking_axes(_path(name), ndim) == expected


@pytest.mark.parametrize("ndim", [1, 4])
def test_stacking_axes_refuses_a_wrong_number_of_axes(ndim):
    with pytest.raises(ValueError, match=rf"'table_VD' has {ndim} axes and its name says 2"):
        stacking_axes(_path("table_VD"), ndim)
