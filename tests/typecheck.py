"""Checks jaxtyping's array annotations at run time, for tests only.

Only annotations of arrays are checked, and only where functions are called. Constructors are not: jax rebuilds a
registered dataclass around whatever a transformation puts into its leaves (shapes, shardings, None). An annotation of
`Array` takes a numpy array too, as every jax function does.
"""

from __future__ import annotations

import typing
from collections.abc import Callable
from typing import Any

import beartype
import jax
import jaxtyping
import numpy as np


def install(package: str) -> None:
    """From here on, the functions of `package` are checked; to be called before its first import."""
    jaxtyping.Array = jax.Array | np.ndarray
    jaxtyping.install_import_hook(package, "typecheck.check")


def check(function: Callable) -> Callable:
    """`function` with its array annotations checked, and its other annotations dropped."""
    if function.__name__ == "__init__":
        return function
    hints = {name: hint for name, hint in function.__annotations__.items() if mentions_array(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype.beartype(function)


def mentions_array(hint: Any) -> bool:
    """Whether a jaxtyping array stands anywhere in `hint`, for example in `tuple[Float[Array, "B"], int] | None`."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(mentions_array(inner) for inner in typing.get_args(hint))
