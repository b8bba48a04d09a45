"""A small U-Net on the feature maps of a backbone: what fine-tuning trains for segmentation and `predict` runs."""

import torch
from torch import nn
from torch.nn.functional import interpolate

WIDTH = 96  # channels of the decoder, at most


class UNet(nn.Module):
    """float32 (B, C, H, W) -> logits (B, outputs, H, W). The weights are named `encoder.*` and `decoder.*`.

    Args:
        encoder: a timm model made with features_only=True; its maps come finest first.
        outputs: planes of the result.

    >>> import timm
    >>> net = UNet(timm.create_model("test_resnet", features_only=True), outputs=1).eval()
    >>> net(torch.zeros(2, 3, 64, 96)).shape
    torch.Size([2, 1, 64, 96])
    """

    def __init__(self, encoder: nn.Module, outputs: int = 1):
        super().__init__()
        channels: list[int] = encoder.feature_info.channels()  # type: ignore[union-attr, operator]
        self.encoder, self.decoder = encoder, Decoder(channels, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _to_size(self.decoder(self.encoder(x)), x)


class Decoder(nn.Module):
    """Feature maps, finest first -> logits (B, outputs, h, w) of the finest map's size.

    Args:
        channels: of the maps, finest first.
        outputs: planes of the result.
    """

    def __init__(self, channels: list[int], outputs: int):
        super().__init__()
        width = [min(c, WIDTH) for c in channels]
        below = [channels[-1], *width[-2:0:-1]]
        self.up = nn.ModuleList(_block(b + c, w) for b, c, w in zip(below, channels[-2::-1], width[-2::-1]))
        self.head = nn.Conv2d(width[0], outputs, 1)

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        *skips, y = maps
        for block, skip in zip(self.up, reversed(skips)):
            y = block(torch.cat([_to_size(y, skip), skip], 1))
        return self.head(y)


def _block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1, bias=False), nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


def _to_size(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return interpolate(y, like.shape[-2:], mode="bilinear", align_corners=False)
