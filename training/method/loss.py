"""The weighted contrastive loss of Meta-USCL (paper, section III)."""

import torch
import torch.nn.functional as F


def info_nce(z, weights=None, temperature=0.5, decoupled=False):
    """Weighted InfoNCE (NT-Xent) over the 2N views of N clips.

    Args:
        z: projections, float (2, N, D): the two views of each clip. They are L2-normalised here.
        weights: float (N,), one positive weight a pair, of any scale: both directions of a pair share it and
            the 2N weights are normalised to sum to 1. None weighs every pair alike.
        temperature: divides the cosine similarities.
        decoupled: the partner is not in the denominator (DCL, Yeh et al., ECCV 2022).

    Returns:
        The loss, a scalar: the sum over the 2N views of weight x cross-entropy of finding the view's partner
        among the other 2N - 1 views.

    Raises:
        ValueError: z is not (2, N >= 2, D): with one clip there is no negative.
    """
    loss = view_losses(z, temperature, decoupled)
    if weights is None:
        return loss.mean()
    return (loss.mean(0) * weights).sum() / weights.sum()


def view_losses(z, temperature=0.5, decoupled=False):
    """The cross-entropy of every view, float (2, N): `info_nce` before the average. Arguments and errors as there."""
    if z.ndim != 3 or z.shape[0] != 2 or z.shape[1] < 2:
        raise ValueError(f"info_nce: z must be (2, N >= 2, D), got {tuple(z.shape)}")
    n = z.shape[1]
    z = F.normalize(z, dim=-1).flatten(0, 1)
    similarity = (z @ z.T / temperature).fill_diagonal_(float("-inf"))  # a view is not its own negative
    partner = torch.arange(2 * n, device=z.device).roll(n)
    if decoupled:
        positive = similarity.gather(1, partner[:, None])
        others = similarity.scatter(1, partner[:, None], float("-inf"))
        return (others.logsumexp(1) - positive[:, 0]).view(2, n)
    return F.cross_entropy(similarity, partner, reduction="none").view(2, n)
