"""Every operation of the augmentation against torchvision or a naive loop, and the ranges of its random numbers."""

import math

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as tv
from scipy import stats

from training.method.augment import apply, draw, normalise

NOTHING = dict(x=0.5, y=0.5, w=1.0, h=1.0, mirror=1.0, brightness=1.0, contrast=1.0, angle=0.0)


def images(n=3, px=24, seed=0):
    return torch.rand(n, px, px, generator=torch.Generator().manual_seed(seed))


def only(n=3, **changes):
    return torch.tensor(list((NOTHING | changes).values())).expand(n, 8)


def test_nothing():
    torch.testing.assert_close(apply(images(), only(), 24), images(), rtol=0, atol=1e-5)


def naive_crop(image, x, y, w, h, size):
    """Bilinear interpolation, pixel by pixel; the edge pixel goes on beyond the image."""
    px = len(image)
    out = torch.empty(size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            v, u = (px * (c - d / 2 + d * (n + 0.5) / size) - 0.5 for c, d, n in ((y, h, i), (x, w, j)))
            top, left = math.floor(v), math.floor(u)
            out[i, j] = sum(
                (1 - abs(v - a)) * (1 - abs(u - b)) * image[min(max(a, 0), px - 1), min(max(b, 0), px - 1)]
                for a in (top, top + 1)
                for b in (left, left + 1)
            )
    return out


@pytest.mark.parametrize(
    "x, y, w, h, size", [(0.45, 0.55, 0.9, 0.8, 16), (0.6, 0.5, 0.8, 1.0, 31), (0.5, 0.5, 1, 1, 9)]
)
def test_crop_and_resize_equal_the_naive_loop(x, y, w, h, size):
    expected = torch.stack([naive_crop(image.double(), x, y, w, h, size) for image in images()])
    cropped = apply(images(), only(x=x, y=y, w=w, h=h), size)
    torch.testing.assert_close(cropped.double(), expected, rtol=0, atol=1e-5)


def test_crop_and_resize_equal_torchvision():
    top, left, height, width = 3, 6, 18, 12  # of 24 pixels
    cropped = apply(
        images(), only(x=(left + width / 2) / 24, y=(top + height / 2) / 24, w=width / 24, h=height / 24), 36
    )
    expected = tv.resized_crop(images(), top, left, height, width, [36, 36], antialias=False)
    inside = slice(3, -3)  # torchvision does not see the pixels around the crop
    torch.testing.assert_close(cropped[:, inside, inside], expected[:, inside, inside], rtol=0, atol=1e-5)


def test_flip_mirrors_the_same_crop():
    crop = dict(x=0.4, y=0.55, w=0.7, h=0.9)
    plain, flipped = (apply(images(), only(mirror=m, **crop), 20) for m in (1.0, -1.0))
    torch.testing.assert_close(flipped, tv.horizontal_flip(plain), rtol=0, atol=1e-5)
    assert not torch.allclose(flipped, plain, atol=0.1)


@pytest.mark.parametrize("factor", [0.36, 0.8, 1.3, 1.64])
def test_brightness_and_contrast_equal_torchvision(factor):
    grey = images()[:, None]
    brighter = apply(images(), only(brightness=factor), 24)
    torch.testing.assert_close(brighter, tv.adjust_brightness(grey, factor)[:, 0], rtol=0, atol=2e-6)
    contrast = apply(images(), only(contrast=factor), 24)
    torch.testing.assert_close(contrast, tv.adjust_contrast(grey, factor)[:, 0], rtol=0, atol=2e-6)
    both = apply(images(), only(brightness=1.2, contrast=factor), 24)
    expected = tv.adjust_contrast(tv.adjust_brightness(grey, 1.2), factor)
    torch.testing.assert_close(both, expected[:, 0], rtol=0, atol=2e-6)


def test_each_image_has_its_own_parameters():
    parameters = torch.from_numpy(draw((6,), np.random.default_rng(0)))
    together = apply(images(6), parameters, 16)
    for image, p, expected in zip(images(6), parameters, together):
        torch.testing.assert_close(apply(image[None], p[None], 16)[0], expected, rtol=0, atol=1e-6)
    assert together.min() >= 0 and together.max() <= 1


def test_normalise():
    torch.testing.assert_close(normalise(torch.tensor([0.18, 0.42, 0.0])), torch.tensor([0.0, 1.0, -0.75]))


def test_ranges_of_the_random_numbers():
    x, y, w, h, mirror, brightness, contrast, angle = draw((20000,), np.random.default_rng(0)).astype(float).T
    eps = 1e-6
    assert (x - w / 2 > -eps).all() and (x + w / 2 < 1 + eps).all()  # inside the image
    assert (y - h / 2 > -eps).all() and (y + h / 2 < 1 + eps).all()
    whole = (w < 1 - eps) & (h < 1 - eps)  # no side was cut to the image
    area, ratio = (w * h)[whole], (w / h)[whole]
    assert 0.7 - eps <= area.min() < 0.71 and area.max() <= 1 and 0.8 - eps <= ratio.min() and ratio.max() <= 1.25 + eps
    assert (angle == 0).all()
    assert set(mirror) == {-1.0, 1.0} and abs((mirror < 0).mean() - 0.5) < 0.02
    for factor in (brightness, contrast):
        assert stats.kstest(factor, stats.uniform(0.36, 1.28).cdf).pvalue > 1e-3
    free = x[whole] - w[whole] / 2  # the crop's place is uniform in what its size leaves
    assert stats.kstest(free / (1 - w[whole]), stats.uniform.cdf).pvalue > 1e-3

    rng = np.random.default_rng(0)
    w, h = draw((20000,), rng, scale=(0.1, 0.2), ratio=(0.5, 2)).astype(float).T[2:4]  # never cut
    assert stats.kstest(w * h, stats.uniform(0.1, 0.1).cdf).pvalue > 1e-3
    assert stats.kstest(np.log(w / h), stats.uniform(-np.log(2), 2 * np.log(2)).cdf).pvalue > 1e-3
    assert (draw((99,), rng, flip=0)[:, 4] == 1).all() and (draw((99,), rng, flip=1)[:, 4] == -1).all()
    assert (draw((99,), rng, jitter=0)[:, 5:7] == 1).all()


def test_rotation():
    turned = apply(images(), only(angle=math.pi / 2), 24)
    assert torch.allclose(turned, images().rot90(1, (1, 2)), atol=1e-4)
    angle = draw((20000,), np.random.default_rng(0), rotate=30)[:, 7]
    assert stats.kstest(angle, stats.uniform(-np.pi / 6, np.pi / 3).cdf).pvalue > 1e-3
    assert np.array_equal(
        draw((9,), np.random.default_rng(0), rotate=30)[:, :7], draw((9,), np.random.default_rng(0))[:, :7]
    )


def test_samples_views_and_frames_are_independent():
    parameters = draw((500, 2, 3), np.random.default_rng(0))
    assert parameters.shape == (500, 2, 3, 8) and parameters.dtype == np.float32
    for kind in (0, 1, 5, 6):  # place, brightness, contrast: six columns, (view, frame), over the samples
        columns = parameters[..., kind].reshape(500, 6)
        correlation = np.corrcoef(columns.T) - np.eye(6)
        assert np.abs(correlation).max() < 0.16  # 3.5 standard errors
        assert kind < 2 or len(np.unique(columns)) > 2990
    mirror = parameters[..., 4].reshape(500, 6)
    assert np.abs(np.corrcoef(mirror.T) - np.eye(6)).max() < 0.16
    between = np.corrcoef(parameters[:, 0, 0, [0, 1, 4, 5, 6]].T) - np.eye(5)
    assert np.abs(between).max() < 0.16
