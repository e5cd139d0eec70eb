"""Softmax attention in one function, `attend`, with several implementations of the same result."""

from sparse_lm.nn.attend.choose import Implementation, Softmax, attend, implementation_of
from sparse_lm.nn.attend.sight import Sight, continued_sight, row_sight

__all__ = ["Implementation", "Sight", "Softmax", "attend", "continued_sight", "implementation_of", "row_sight"]
