"""Routers by name: a router is one file here and one line in this table."""

from __future__ import annotations

from sparse_lm.moe.routers.base import Router, RouterConfig, RouterShape
from sparse_lm.moe.routers.top_k import TopK

__all__ = ["ROUTERS", "Router", "RouterConfig", "RouterShape"]

ROUTERS: dict[str, type[RouterConfig]] = {config.kind: config for config in (TopK,)}
