"""Who sees whom, described by a few numbers per token instead of a mask of L x L.

A query sees a key when both are of one document, the key is no padding and not later than the query, and the key is
within the query's reach: at most `window` - 1 places before it, and not before the chunk of positions that it is in.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Scalar

Layout = Literal["row", "subset", "cache"]


@typing.dataclass_transform(frozen_default=True)
def _pytree(cls):
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Sight:
    """What decides which keys a query sees.

    query_segments_BL, key_segments_BT: number of the document of each token; 0 is padding, which nothing sees.
    query_places_BL, key_places_BT: index in the row, which orders the tokens. floor_BL: the first place of the chunk
    that the query is in; None is no chunks. window: how many places a query sees, its own included; None is all.
    reach: the smaller one of window and chunk, for whoever skips what no query can see; None is no limit.
    layout: how queries stand to keys. `row`: they are the same tokens, all of a row. `subset`: the same tokens, some of
    a row, in order. `cache`: they continue the keys.
    """

    query_segments_BL: Int[Array, "*N B L"]
    key_segments_BT: Int[Array, "*M B T"]
    query_places_BL: Int[Array, "*N B L"]
    key_places_BT: Int[Array, "*M B T"]
    floor_BL: Int[Array, "*N B L"] | None = None
    window: int | None = dataclasses.field(default=None, metadata={"static": True})
    reach: int | None = dataclasses.field(default=None, metadata={"static": True})
    layout: Layout = dataclasses.field(default="row", metadata={"static": True})

    def within(self, window: int | None, chunk: int | None, positions_BL: Int[Array, "B L"]) -> Sight:
        """The same with a limited reach. positions_BL: of the queries in their documents; chunks begin at multiples."""
        floor_BL = None if chunk is None else self.query_places_BL - positions_BL % chunk
        limits = [limit for limit in (window, chunk) if limit is not None]
        return dataclasses.replace(self, floor_BL=floor_BL, window=window, reach=min(limits, default=None))

    def mask(self) -> Bool[Array, "B L T"]:
        """True where a query sees a key."""
        query, key = self.query_places_BL[:, :, None], self.key_places_BT[:, None, :]
        same = self.query_segments_BL[:, :, None] == self.key_segments_BT[:, None, :]
        seen = same & (key <= query) & (self.key_segments_BT[:, None, :] > 0)
        if self.window is not None:
            seen &= key > query - self.window
        if self.floor_BL is not None:
            seen &= key >= self.floor_BL[:, :, None]
        return seen

    def hiding(self, hidden_BT: Bool[Array, "B T"]) -> Sight:
        """The same with keys that nothing sees."""
        return dataclasses.replace(self, key_segments_BT=jnp.where(hidden_BT, 0, self.key_segments_BT))


def row_sight(segments_BL: Int[Array, "B L"]) -> Sight:
    """Of rows whose tokens look at each other."""
    places_BL = _places(segments_BL)
    return Sight(segments_BL, segments_BL, places_BL, places_BL)


def continued_sight(
    query_segments_BL: Int[Array, "B L"], key_segments_BT: Int[Array, "B T"], start: int | Scalar
) -> Sight:
    """Of tokens that continue a cache. start: index in the row of the first one."""
    query_places_BL, key_places_BT = _places(query_segments_BL) + start, _places(key_segments_BT)
    return Sight(query_segments_BL, key_segments_BT, query_places_BL, key_places_BT, layout="cache")


def _places(like_BL: Int[Array, "B L"]) -> Int[Array, "B L"]:
    """The index in the row, laid out as `like`."""
    return jnp.zeros_like(like_BL) + jnp.arange(like_BL.shape[1], dtype=like_BL.dtype)
