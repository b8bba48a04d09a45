"""Crops for distillation: teacher and student see the very same picture, at their own number of pixels.

Strong and varied crops are what makes few pictures enough (Asano and Saeed, arXiv 2112.00725), and a teacher that sees
the student's own crop, mixed pictures too, is what keeps a long training from overfitting (Beyer et al.,
arXiv 2106.05237).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

RADIUS = 4  # of the blur, in pixels


def draw(count, rng, scale=(0.15, 1.0), mixup=0.5):
    """Parameters of `count` crops.

    Args:
        rng: numpy Generator.
        scale: range of the crop's share of the picture's area (log-uniform).
        mixup: share of the crops that are mixed with another one of the batch.

    Returns:
        float32 (count, 12): centre x, y and size w, h of the crop in units of the picture; rotation in radians;
        horizontal and vertical flip (+1 or -1); gamma, contrast, and depth gain (the brightness grows or falls by
        exp(gain) from top to bottom); blur in pixels; the crop's own share in the mixture.
    """
    area = np.exp(rng.uniform(math.log(scale[0]), math.log(scale[1]), count))
    aspect = np.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3), count))
    w, h = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    x, y = rng.uniform(w / 2, 1 - w / 2), rng.uniform(h / 2, 1 - h / 2)
    angle = rng.uniform(-math.pi / 6, math.pi / 6, count) * (rng.random(count) < 0.5)
    mirror = np.where(rng.random(count) < 0.5, -1.0, 1.0)
    upside_down = np.where(rng.random(count) < 0.1, -1.0, 1.0)
    gamma, contrast = np.exp(rng.uniform(-0.4, 0.4, count)), rng.uniform(0.6, 1.4, count)
    gain = rng.uniform(-0.7, 0.7, count) * (rng.random(count) < 0.5)
    blur = rng.uniform(0.0, 2.0, count) * (rng.random(count) < 0.3)
    share = np.where(rng.random(count) < mixup, rng.beta(1, 1, count), 1.0)
    columns = [x, y, w, h, angle, mirror, upside_down, gamma, contrast, gain, blur, share]
    return np.stack(columns, axis=1).astype(np.float32)


def make(pictures, parameters, size):
    """Cut, turn, shade, blur and mix.

    Args:
        pictures: uint8 (B, S, S), grey.
        parameters: float32 (B, 12) from `draw`, on the same device.
        size: pixels of the crops' sides.

    Returns:
        float32 (B, 1, size, size) in [0, 1].
    """
    x, y, w, h, angle, mirror, upside_down, gamma, contrast, gain, blur, share = parameters.T
    cos, sin = angle.cos(), angle.sin()
    rows = [w * mirror * cos, -h * upside_down * sin, 2 * x - 1, w * mirror * sin, h * upside_down * cos, 2 * y - 1]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(pictures), 1, size, size), align_corners=False)
    crops = F.grid_sample(pictures[:, None].float() / 255, grid, padding_mode="zeros", align_corners=False)
    depth = torch.linspace(-0.5, 0.5, size, device=crops.device).view(1, 1, -1, 1)
    column = (-1, 1, 1, 1)
    crops = crops.clamp(1e-4, 1) ** gamma.view(column) * torch.exp(gain.view(column) * depth)
    mean = crops.mean((2, 3), keepdim=True)
    crops = _blurred(torch.lerp(mean, crops, contrast.view(column)).clamp(0, 1), blur)
    return torch.lerp(crops.roll(1, 0), crops, share.view(column))


def _blurred(crops, sigma):
    """Gaussian blur, each picture by its own sigma (0: none)."""
    offsets = torch.arange(-RADIUS, RADIUS + 1, device=crops.device, dtype=crops.dtype)
    kernels = torch.exp(-(offsets**2) / (2 * sigma.clamp_min(1e-3)[:, None] ** 2))
    kernels = (kernels / kernels.sum(1, keepdim=True))[:, :, None, None, None]
    padded = F.pad(crops, (RADIUS,) * 4, mode="replicate")
    size = crops.shape[-1]
    rows = sum(kernels[:, k] * padded[..., k : k + size, :] for k in range(len(offsets)))
    return sum(kernels[:, k] * rows[..., k : k + size] for k in range(len(offsets)))


def smaller(crops, size):
    """The same crops with fewer pixels, by the antialiased filter of the preprocessing."""
    if crops.shape[-1] == size:
        return crops
    return F.interpolate(crops, size=(size, size), mode="bilinear", antialias=True)
