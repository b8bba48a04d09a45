"""The two networks that are trained: the encoder (backbone + projector) and CMW-Net."""

from functools import cached_property

import timm
import torch
from timm.models import group_parameters
from torch import nn

from training.method.weighting import STATISTICS
from uscl_hub.models import width


class Encoder(nn.Module):
    """A timm backbone and the 2-layer projector of SimCLR.

    Args:
        name: any timm model name.
        dim: width of the projection (128 in the paper).
        **kwargs: passed on to `timm.create_model`.

    forward(x): images, float (B, C, H, W) -> representations (B, d) and projections (B, dim).
    """

    def __init__(self, name, dim=128, **kwargs):
        super().__init__()
        self.backbone = timm.create_model(name, num_classes=0, **kwargs)
        self.num_features = d = width(self.backbone)
        self.projector = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, dim))
        self.held = []  # modules whose running statistics stay

    def hold(self, stages):
        """Keep the statistics of the first `stages` stages (1: the stem). Returns the parameters that must stay, too.

        Raises:
            ValueError: the backbone has fewer stages, or timm does not know them.
        """
        if not stages:
            return set()
        if stages >= len(self.stages):
            raise ValueError(f"it has {len(self.stages)} stages")
        kept = {name for stage in self.stages[:stages] for name in stage}
        owners = {name.rpartition(".")[0] for name in kept} - {""}  # the backbone's own parameters have no statistics
        self.held = [m for name, m in self.backbone.named_modules() if name in owners]
        self.train(self.training)
        return {p for name, p in self.backbone.named_parameters() if name in kept}

    @cached_property
    def stages(self):
        """The backbone's parameter names, a list a stage, from the input on. ValueError: timm does not know them."""
        matcher = getattr(self.backbone, "group_matcher", None)
        if matcher is None:
            raise ValueError(f"timm does not know the stages of a {type(self.backbone).__name__}")
        return [names for _, names in sorted(group_parameters(self.backbone, matcher(coarse=True)).items())]

    def last(self, stages):
        """The parameters by name of the last `stages` stages and the projector; 0: all. ValueError as `stages`."""
        parameters = dict(self.named_parameters())
        if not stages:
            return parameters
        left_out = {f"backbone.{name}" for stage in self.stages[:-stages] for name in stage}
        return {name: p for name, p in parameters.items() if name not in left_out}

    def train(self, mode=True):
        super().train(mode)
        for module in getattr(self, "held", ()):
            module.eval()
        return self

    def forward(self, x):
        h = self.backbone(x)
        return h, self.projector(h)


def input_channels(network):
    """Channels of the images that a network takes: those of its first convolution, else timm's 3."""
    return next((m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d)), 3)


class CMWNet(nn.Module):
    """Contrastive meta weight network: the weight of a positive pair from its two representations.

    2d -> hidden -> 1 with ReLU and sigmoid (hidden = 10 in the paper).

    forward(h): representations, float (2, N, d) -> weights in (0, 1), float (N,).
    """

    def __init__(self, d, hidden=10):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * d, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, h):
        return torch.sigmoid(self.net(torch.cat([h[0], h[1]], dim=1))).squeeze(1)


class StatisticsNet(nn.Module):
    """CMW-Net that sees of a pair no representation but `weighting.STATISTICS`.

    forward(x): float (N, 3) -> weights in (0, 1), float (N,).
    """

    def __init__(self, hidden=10):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(len(STATISTICS), hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, x):
        return torch.sigmoid(self.net(x)).squeeze(1)
