"""Augmentation of grey images in batch on the device, with random parameters for every image.

Random resized crop, horizontal flip, brightness and contrast jitter, as in the paper (hue and saturation do
nothing to a grey image). The parameters are drawn with numpy on the CPU, so that a training is reproducible from
its seed on any device and for any number of processes.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from uscl_hub.preprocess import MEAN, STD


# 7 arguments: one for each number of the augmentation, with the paper's values as defaults
def draw(shape, rng, scale=(0.7, 1.0), ratio=(0.8, 1.25), jitter=0.64, flip=0.5, rotate=0.0):
    """Draw augmentations.

    Args:
        shape: how many, a tuple of ints.
        rng: numpy Generator.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's aspect ratio (log-uniform); a side longer than the image is cut to it.
        jitter: brightness and contrast factors are uniform in [1 - jitter, 1 + jitter].
        flip: probability of a horizontal flip.
        rotate: largest angle in degrees, either way.

    Returns:
        float32 (*shape, 8): crop centre x, y and size x, y in units of the image, flip (+1 or -1), brightness,
        contrast, angle in radians.
    """
    area = rng.uniform(*scale, shape)
    aspect = np.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1]), shape))
    w, h = np.minimum(np.sqrt(area * aspect), 1), np.minimum(np.sqrt(area / aspect), 1)
    x, y = rng.uniform(w / 2, 1 - w / 2), rng.uniform(h / 2, 1 - h / 2)
    mirror = np.where(rng.random(shape) < flip, -1.0, 1.0)
    brightness, contrast = rng.uniform(1 - jitter, 1 + jitter, (2, *shape))
    angle = np.radians(rng.uniform(-rotate, rotate, shape)) if rotate else np.zeros(shape)
    return np.stack([x, y, w, h, mirror, brightness, contrast, angle], axis=-1).astype(np.float32)


def apply(images, parameters, size):
    """Crop, resize (bilinear), flip and jitter.

    Args:
        images: float (B, S, S) in [0, 1].
        parameters: float32 (B, 8) from `draw`, on the same device.
        size: pixels of the result's sides.

    Returns:
        float (B, size, size) in [0, 1].
    """
    x, y, w, h, mirror, brightness, contrast, angle = parameters.unbind(1)
    cos, sin = angle.cos(), angle.sin()
    rows = [w * mirror * cos, -h * sin, 2 * x - 1, w * mirror * sin, h * cos, 2 * y - 1]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, (len(images), 1, size, size), align_corners=False)
    images = F.grid_sample(images[:, None], grid, padding_mode="border", align_corners=False)[:, 0]
    images = (images * brightness[:, None, None]).clamp_(0, 1)
    mean = images.mean((1, 2), keepdim=True)
    return torch.lerp(mean, images, contrast[:, None, None]).clamp_(0, 1)


def normalise(images):
    return (images - MEAN) / STD
