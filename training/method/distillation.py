"""Distillation: a student learns the features of frozen teachers, for crops that both see (loss of matched features).

The targets are the teachers' pooled features and, where a teacher ends in a feature map, the map itself, projected on
their leading principal components. A linear layer on the student's features, the same one at every place of its map,
must give them. With the targets scaled to a mean variance of 1, the loss is the unexplained share of their variance.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Teachers(nn.Module):
    """Frozen networks side by side.

    Args:
        networks: list of (timm model without classifier, mean, std): what it takes is (grey - mean) / std, in three
            equal channels.

    forward(crops, cells): grey crops, float (B, 1, S, S) in [0, 1] -> pooled features (B, D), and feature maps
    (B, D, cells, cells), or None if a network does not end in a map that is simply averaged.
    """

    def __init__(self, networks):
        super().__init__()
        self.networks = nn.ModuleList(model.eval().requires_grad_(False) for model, _, _ in networks)
        self.scales = [(float(mean), float(std)) for _, mean, std in networks]

    def train(self, mode=True):
        return super().train(False)  # frozen: also its running statistics

    @torch.no_grad()
    def forward(self, crops, cells):
        pooled, maps = [], []
        for network, (mean, std) in zip(self.networks, self.scales):
            x = ((crops - mean) / std).expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
            features = network.forward_features(x)
            vector = network.forward_head(features, pre_logits=True).float()
            pooled.append(vector)
            # a map counts if its mean is the pooled vector; transformers' tokens and other heads do not
            if features.ndim == 4 and features.shape[1] == vector.shape[1]:
                maps.append(F.adaptive_avg_pool2d(features.float(), cells))
        return torch.cat(pooled, 1), torch.cat(maps, 1) if len(maps) == len(self.networks) else None


class Distiller(nn.Module):
    """The student's linear head and the projection of the targets.

    Args:
        student_features, teacher_features: widths of the two.
        components: principal components of the teachers' features that are targets.

    `fit` sets the projection once; it is part of the state, so that a resumed training has the same targets.
    """

    def __init__(self, student_features, teacher_features, components=512):
        super().__init__()
        self.head = nn.Linear(student_features, min(components, teacher_features))
        self.register_buffer("mean", torch.zeros(teacher_features))
        self.register_buffer("projection", torch.zeros(teacher_features, self.head.out_features))

    @torch.no_grad()
    def fit(self, features):
        """Set the projection from the teachers' features of a few thousand crops, float (B, D).

        Each feature is standardised. A component's variance becomes the square root of what it was (half of a
        whitening: small components are heard, noise is not shouted), and the mean variance of a target 1.
        """
        x = features.double()
        mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
        values, vectors = torch.linalg.eigh(torch.cov(((x - mean) / std).T))
        count = self.projection.shape[1]
        values, vectors = values.flip(0)[:count].clamp_min(1e-8), vectors.flip(1)[:, :count]
        scale = values**-0.25
        scale = scale / (values * scale**2).mean().sqrt()
        self.mean.copy_(mean)
        self.projection.copy_(vectors / std[:, None] * scale)

    def targets(self, pooled, maps):
        """Teachers' features (B, D) and maps (B, D, h, w) or None -> projected ones, (B, P) and (B, P, h, w)."""
        pooled = (pooled - self.mean) @ self.projection
        if maps is not None:
            maps = torch.einsum("bdhw,dp->bphw", maps - self.mean[:, None, None], self.projection)
        return pooled, maps

    def forward(self, backbone, crops, targets, target_maps=None, dense=0.0):
        """Loss of the student on normalised crops, (B, C, s, s); its share of unexplained variance.

        Args:
            backbone: a timm model without classifier.
            targets: (B, P). target_maps: (B, P, h, w) for the map before the pooling, with weight `dense`.
        """
        if not dense or target_maps is None:
            features = backbone(crops)
            return F.mse_loss(self.head(features.float()), targets)
        maps = backbone.forward_features(crops)
        pooled = backbone.forward_head(maps, pre_logits=True)
        loss = F.mse_loss(self.head(pooled.float()), targets)
        maps = F.adaptive_avg_pool2d(maps.float(), target_maps.shape[-2:])
        predicted = torch.einsum("bdhw,pd->bphw", maps, self.head.weight) + self.head.bias[:, None, None]
        return loss + dense * F.mse_loss(predicted, target_maps) / target_maps.var().clamp_min(1e-6)
