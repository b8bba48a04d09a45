"""How a pair gets its weight: what CMW-Net sees of it, and what is done with the number that it gives."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from training.method.loss import view_losses

STATISTICS = ("similarity of the representations", "log(1 + frames apart)", "loss")  # what `statistics` gives


class About(NamedTuple):
    """What is known of the N pairs of a batch, over all ranks, beside their images.

    distance: float32 (N,), frames from a pair's first frame to its last; reach: int64 (N,), the largest distance that
    it could have; source: int64 (N,), a number for each root folder.
    """

    distance: torch.Tensor
    reach: torch.Tensor
    source: torch.Tensor

    def to(self, device):
        return About(*(t.to(device) for t in self))


@dataclass(frozen=True)
class Weighting:
    """The settings of the weights; see `meta.input`, `meta.by_source` and `loss.weights`.

    Args:
        input: of CMW-Net: 'representation' or 'statistics'.
        by_source: weights are relative to the mean of the same source's pairs in the batch.
        by_distance: without CMW-Net, weights fall with the distance between a pair's frames.
    """

    input: str = "representation"
    by_source: bool = False
    by_distance: bool = False

    def weigh(self, learner, h, z, about):
        """Weights of the pairs, float (N,), or None: all alike.

        Args:
            learner: `step.Learner`; h, z: representations (2, N, d) and projections (2, N, 128).
            about: `About`; None will do for the paper's weights.
        """
        if learner.cmw is None:
            weights = falling(about).to(z) if self.by_distance else None
        elif self.input == "statistics":
            weights = learner.cmw(statistics(learner, h, z, about))
        else:
            weights = learner.cmw(h)
        return within_sources(weights, about.source) if self.by_source and weights is not None else weights


def falling(about):
    """IVPP's form: 1 for two frames at the same place, falling linearly to 1 / (reach + 1) at the largest distance.

    VanBerlo et al., "Intra-video positive pairs", arXiv 2403.07715. There the reach is the largest distance that the
    settings allow; here that of the clip, where it is shorter.

    >>> falling(About(torch.tensor([0.0, 2.0, 4.0]), torch.tensor([4, 4, 4]), torch.zeros(3, dtype=torch.long)))
    tensor([1.0000, 0.6000, 0.2000])
    """
    return (about.reach - about.distance + 1) / (about.reach + 1)


@torch.no_grad()
def scores(learner, h, z):
    """Of every pair the cosine similarity of its representations and its loss (the mean of both views'): (N,) each."""
    losses = view_losses(z, learner.temperature, learner.decoupled).mean(0)
    return torch.cosine_similarity(h[0], h[1]), losses


@torch.no_grad()
def statistics(learner, h, z, about):
    """STATISTICS of the pairs, each with mean 0 and variance 1 in the batch: float (N, 3), constants.

    Standardised, because similarity and loss drift through a training, and a weight matters relative to others only.
    """
    similarity, losses = scores(learner, h, z)
    x = torch.stack([similarity, about.distance.to(losses).log1p(), losses], dim=1)
    x = x - x.mean(0)
    return x / x.square().mean(0).sqrt().clamp_min(1e-6)  # 1e-6: a constant stays 0


def within_sources(weights, source):
    """Divide each weight by the mean weight of its source's pairs.

    >>> within_sources(torch.tensor([1.0, 3.0, 0.2]), torch.tensor([0, 0, 5]))
    tensor([0.5000, 1.5000, 1.0000])
    """
    _, source, counts = source.unique(return_inverse=True, return_counts=True)
    sums = weights.new_zeros(len(counts)).index_add(0, source, weights)
    return weights * (counts / sums)[source]
