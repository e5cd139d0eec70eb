"""Routers by name: a router is one file here and one line in this table."""

from __future__ import annotations

from sparse_lm.moe.routers.base import Router, RouterConfig, RouterShape
from sparse_lm.moe.routers.base_layer import Base
from sparse_lm.moe.routers.expert_choice import ExpertChoice
from sparse_lm.moe.routers.fixed_noise import FixedNoise
from sparse_lm.moe.routers.hash import Hash
from sparse_lm.moe.routers.noisy_top_k import NoisyTopK
from sparse_lm.moe.routers.prototype import Prototype
from sparse_lm.moe.routers.relu import Relu
from sparse_lm.moe.routers.sigmoid import Sigmoid
from sparse_lm.moe.routers.sinkhorn import Sinkhorn
from sparse_lm.moe.routers.soft import SoftMixture
from sparse_lm.moe.routers.sparse_mixer import SparseMixer
from sparse_lm.moe.routers.top_k import TopK

__all__ = ["ROUTERS", "Router", "RouterConfig", "RouterShape"]

ROUTERS: dict[str, type[RouterConfig]] = {
    config.kind: config
    for config in (
        TopK,
        Sigmoid,
        Relu,
        NoisyTopK,
        FixedNoise,
        Prototype,
        Hash,
        ExpertChoice,
        Sinkhorn,
        Base,
        SparseMixer,
        SoftMixture,
    )
}
