"""The losses of routers with Gaussian noise: squared coefficients of variation of importance and of a smooth load.

Both are squares of sums over tokens, which do not add up over parts of a batch. Here a sum runs over a routing group
and the loss of a batch is the mean over groups, weighted by their real tokens: that is a sum of a number per token, so
that devices, layers and microbatches add up to the loss of the batch exactly.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclasses.dataclass(frozen=True)
class CvLosses:
    """Weights of the importance loss and of the load loss, each added once per sparse layer."""

    importance: float
    load: float

    def penalty(
        self, importance_GSE: Float[Array, "G S E"], load_GSE: Float[Array, "G S E"], mask_GS: Bool[Array, "G S"]
    ) -> Float[Array, "G S"]:
        """The loss of the token's group, at each token: see `Scores.penalty_GS`. Padding counts in no sum.

        importance_GSE: each token's weight for each expert. load_GSE: its chance to choose the expert.
        """
        real_GS1 = mask_GS[..., None].astype(jnp.float32)
        loss_G = self.importance * squared_variation(jnp.sum(importance_GSE * real_GS1, axis=1))
        loss_G = loss_G + self.load * squared_variation(jnp.sum(load_GSE * real_GS1, axis=1))
        return jnp.broadcast_to(loss_G[:, None], mask_GS.shape)


def squared_variation(total_GE: Float[Array, "G E"]) -> Float[Array, "G"]:
    """Variance over experts / squared mean; 0 for a group without tokens.

    Convention: the variance is divided by E (V-MoE, Tensor2Tensor). Tutel divides by E - 1: its value is
    E / (E - 1) times this one. Source: Shazeer et al. 2017, equation 7.
    """
    mean_G = jnp.mean(total_GE, axis=-1)
    safe_G = jnp.where(mean_G > 0, mean_G, 1.0)
    return jnp.mean(jnp.square(total_GE - mean_G[:, None]), axis=-1) / jnp.square(safe_G)


def chance_of_top_k(
    clean_GSE: Float[Array, "G S E"], noisy_GSE: Float[Array, "G S E"], std: jax.Array | float, top_k: int, redraw: str
) -> Float[Array, "G S E"]:
    """The probability that an expert is among a token's first k when noise is drawn again; its sum is the smooth load.

    std: of the noise, positive; an array or one number. redraw: whose noise is drawn again. `one`: the expert's own,
    with the noise of the others kept, so that it has to beat the k-th highest of the *others* (Shazeer et al. 2017,
    equations 8 and 9). `all`: it has to beat the k-th highest of all, itself included (the V-MoE code).
    """
    num_experts = noisy_GSE.shape[-1]
    if top_k == num_experts:
        return jnp.ones_like(clean_GSE)
    best = jax.lax.top_k(noisy_GSE, top_k + 1)[0]
    last_in_GS1, first_out_GS1 = best[..., top_k - 1 : top_k], best[..., top_k:]
    threshold = last_in_GS1
    if redraw == "one":
        threshold = jnp.where(noisy_GSE > first_out_GS1, first_out_GS1, last_in_GS1)
    return jax.scipy.special.ndtr((clean_GSE - threshold) / std)


def chosen(expert_GSK: jax.Array, weight_GSK: jax.Array | float, num_experts: int) -> Float[Array, "G S E"]:
    """Each choice's weight at its expert, 0 elsewhere. Weights of 1 are the chances without noise: a step."""
    one_hot_GSKE = jax.nn.one_hot(expert_GSK, num_experts, dtype=jnp.float32)
    weight_GSK = jnp.broadcast_to(jnp.asarray(weight_GSK, jnp.float32), expert_GSK.shape)
    return jnp.sum(one_hot_GSKE * weight_GSK[..., None], axis=2)
