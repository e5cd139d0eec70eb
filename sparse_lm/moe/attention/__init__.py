"""Attention with experts, by name: a form is one file here and one line in this table."""

from __future__ import annotations

from sparse_lm.moe.attention.base import AttentionExperts, AttentionInputs, AttentionShape, ExpertAttention
from sparse_lm.moe.attention.mixture import Mixture
from sparse_lm.moe.attention.switch_head import SwitchHead

__all__ = ["ATTENTIONS", "AttentionExperts", "AttentionInputs", "AttentionShape", "ExpertAttention"]

ATTENTIONS: dict[str, type[AttentionExperts]] = {config.kind: config for config in (Mixture, SwitchHead)}
