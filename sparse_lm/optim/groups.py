"""Which parameters belong together, told from their names: `up_EDF` has the axes E, D and F.

A stack of layers carries one leading N axis more than its letters say.
"""

from __future__ import annotations

from typing import Any

import jax

from sparse_lm.dims import LETTERS

_NOT_DECAYED = ("scale", "bias", "table")
_CONTAINER = "value"  # the last entry of the path of a Flax variable's array


def parameter_name(path: tuple) -> str:
    """The attribute name in a leaf's path, for example `up_EDF` in `layers/moe/experts/up_EDF/value`."""
    entries = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
    if entries and entries[-1] == _CONTAINER:
        entries.pop()
    return entries[-1] if entries else ""


def letters(path: tuple) -> str:
    """The logical axes of the parameter at `path`, without the N of a stack of layers.

    Raises `ValueError` naming the path when the name does not end in known shape letters.
    """
    base, _, suffix = parameter_name(path).rpartition("_")
    if not base or not suffix or any(letter not in LETTERS for letter in suffix):
        raise ValueError(
            f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')!r} does not say its axes; "
            f"end its name in shape letters such as `up_EDF`, known: {', '.join(LETTERS)}"
        )
    return suffix.removeprefix("N")


def decays(path: tuple) -> bool:
    """Whether weight decay applies to the parameter at `path`.

    Only matrices decay: at least two axes apart from the stacking ones, N and E. Exempt are

    - scales and biases: few numbers, and pulling a scale to zero shrinks activations instead of limiting capacity;
    - tables of embeddings (named `table`, or with the axis V): a rare token's row has a zero gradient on most updates,
      and decay would act on it as often as on a common one's;
    - a router's weights (`DE`): E counts its outputs, each a vector; their length is the sharpness of the routing,
      and decay would pull it towards uniform, against the task and on top of the z-loss.
    """
    axes = letters(path)
    words = parameter_name(path).split("_")[:-1]
    return "V" not in axes and not set(words) & set(_NOT_DECAYED) and len(axes.replace("N", "").replace("E", "")) >= 2


def decay_mask(params: Any) -> Any:
    """A tree like `params` with a Python bool per leaf: does weight decay apply? (see `decays`)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: decays(path), params)


def stacking_axes(path: tuple, ndim: int) -> int:
    """How many leading axes of the parameter at `path` only stack independent parameters: layers, then experts.

    `up_EDF` with four axes is a stack of layers of experts: 2. `table_VD` with two is one parameter: 0. E counts only
    where it comes first: in a router's `DE` it is an ordinary side of the matrix.

    Raises `ValueError` when the number of axes is neither that of the letters nor one more.
    """
    axes = letters(path)
    if ndim - len(axes) not in (0, 1):
        raise ValueError(
            f"parameter {jax.tree_util.keystr(path, simple=True, separator='/')!r} has {ndim} axes and its name says "
            f"{len(axes)}; rename it, or stack layers along one leading axis only"
        )
    return ndim - len(axes) + (axes.startswith("E") and len(axes) > 1)
