"""Grids of points on which the laws are told apart, near those of the papers."""

from __future__ import annotations

import numpy as np


def grid(**axes) -> dict[str, np.ndarray]:
    """Every combination of the axes, as columns."""
    mesh = np.meshgrid(*axes.values(), indexing="ij")
    return {name: values.ravel() for name, values in zip(axes, mesh, strict=True)}


GRIDS = {
    "chinchilla": grid(active=np.geomspace(5e7, 2e10, 7), tokens=np.geomspace(1e9, 1e12, 7)),
    "unified": grid(active=np.geomspace(1.5e7, 1.3e9, 6), experts=2.0 ** np.arange(10)),
    "granularity": grid(
        total_non_embedding=np.geomspace(1e8, 4e9, 4),
        tokens=np.geomspace(1.6e10, 1.3e11, 4),
        granularity=2.0 ** np.arange(6),
    ),
    "joint": grid(active=np.geomspace(7e7, 3e9, 4), tokens=np.geomspace(5e8, 8e10, 4), experts=2.0 ** np.arange(8)),
    "sparsity": grid(
        total=np.geomspace(1e8, 3e10, 5),
        tokens=np.geomspace(1e9, 3e11, 4),
        sparsity=np.array([0.0, 0.5, 0.75, 0.9, 0.95, 0.98]),
    ),
}
