"""The numbers of an analysis as JSON; what is not a number there is null."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from sparse_lm.analysis.intervene import Effects
from sparse_lm.analysis.observe import drop_shares, loads
from sparse_lm.analysis.run import Analysis, InFeedForward, Specialisation


def as_json(found: Analysis, command: str = "") -> dict[str, Any]:
    """Everything that the page shows, and more digits of it. Layers and experts are lists, counted from 0.

    Without experts in the feed-forward layers what is said of those is not there.
    """
    content = {
        "command": command,
        "workdir": str(found.workdir),
        "step": found.loaded.step,
        "options": dataclasses.asdict(found.options),
        "tokens": len(found.tokens.id_M),
        "domains": list(found.domains),
        "data_of_the_run": found.expected_data,
        "attention": None
        if found.attention is None
        else {
            "experts": list(found.attention.experts),
            "load": found.attention.load_NE.tolist(),
            "specialisation": {one.kind: _specialisation(one) for one in found.attention.specialisation},
        },
    }
    return content if found.feed_forward is None else content | _feed_forward(found, found.feed_forward)


def _feed_forward(found: Analysis, inside: InFeedForward) -> dict[str, Any]:
    observed, pairs = inside.observed, inside.pairs_NEE
    own = np.maximum(np.einsum("nii->ni", pairs), 1)
    return {
        "experts": list(inside.experts),
        "load": loads(observed.expert_NMK, observed.num_experts).tolist(),
        "specialisation": {one.kind: _specialisation(one) for one in inside.specialisation},
        "saturation": {
            "steps": list(inside.saturation.steps),
            "share": plain(inside.saturation.share_XN),
            "unrelated": inside.saturation.chance,
        },
        "coactivation": plain(pairs / own[:, :, None]),
        "dropped_by_position": plain(drop_shares(observed.routed_NP, observed.dropped_NP)),
        "vocabulary": [[dataclasses.asdict(words) for words in layer] for layer in inside.words],
        "removal": _effects(found, inside.removal),
        "forcing": _effects(found, inside.forcing),
    }


def _specialisation(one: Specialisation) -> dict[str, Any]:
    return {
        "labels": list(one.names),
        "layers": [
            {**dataclasses.asdict(x), "excess": x.excess, "share": x.share, "within_chance": x.chance}
            for x in one.information
        ],
        "counts": one.counts_NEC.tolist(),
    }


def _effects(found: Analysis, effect: Effects | None) -> dict[str, Any] | None:
    if effect is None:
        return None
    return {
        "loss": plain(effect.loss),
        "loss_by_domain": dict(zip(found.domains, plain(effect.loss_C), strict=True)),
        "targets_by_domain": dict(zip(found.domains, effect.targets_C.tolist(), strict=True)),
        "change": plain(effect.change_NE),
        "change_error": plain(effect.error_NE),
        "change_by_domain": plain(effect.change_NEC),
        "change_by_domain_error": plain(effect.error_NEC),
    }


def plain(values: Any) -> Any:
    """An array, or a number, as nested lists of floats with None in place of what is not finite."""
    if isinstance(values, np.ndarray):
        return plain(values.tolist())
    if isinstance(values, list):
        return [plain(value) for value in values]
    return float(values) if math.isfinite(values) else None
