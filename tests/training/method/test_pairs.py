"""Positive pair generation (PPI) against its definition and naive loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from training.method import augment
from training.method.pairs import choose_frames, make_views, mixing_weights
from uscl_hub.preprocess import MEAN, STD

IDENTITY = [0.5, 0.5, 1, 1, 1, 1, 1, 0]  # the whole image, as it is


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 50), st.integers(0, 10**6))
def test_frames_are_different_sorted_and_near_each_other(length, k, max_dist, seed):
    numbers = choose_frames(length, k, max_dist, np.random.default_rng(seed))
    assert len(numbers) == min(k, length, max_dist + 1)
    assert numbers == sorted(set(numbers))
    assert 0 <= numbers[0] and numbers[-1] < length and numbers[-1] - numbers[0] <= max_dist


def test_every_frame_is_drawn():
    rng = np.random.default_rng(0)
    counts = np.bincount([choose_frames(10, 1, 999, rng)[0] for _ in range(5000)], minlength=10)
    assert stats.chisquare(counts).pvalue > 1e-3  # a single frame: uniform over the clip
    seen = {n for _ in range(500) for n in choose_frames(10, 3, 4, rng)}
    assert seen == set(range(10))


@pytest.mark.parametrize("mode", ["standard", "inner"])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 8])
def test_weights_are_convex(mode, k):
    rng = np.random.default_rng(k)
    for _ in range(50):
        weights = np.array(mixing_weights(k, mode, 3, 5, rng))
        assert weights.shape == (2, k) and (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-12)


def test_fallbacks_of_the_ablation():
    rng = np.random.default_rng(0)
    for mode in ("standard", "inner"):
        assert mixing_weights(1, mode, 3, 5, rng) == [[1], [1]]  # one frame twice
        assert mixing_weights(2, mode, 3, 5, rng) == [[1, 0], [0, 1]]  # the two frames
    with pytest.raises(ValueError, match="'outer'"):
        mixing_weights(3, "outer", 3, 5, rng)


@pytest.mark.parametrize("k", [3, 4, 5, 8])
def test_standard_shares_the_middle_frame_only(k):
    first, second = np.array(mixing_weights(k, "standard", 3, 5, np.random.default_rng(k)))
    assert np.flatnonzero(first).tolist() == list(range(k // 2 + 1))
    assert np.flatnonzero(second).tolist() == list(range(k // 2, k))


def test_distribution_of_the_weights():
    rng = np.random.default_rng(0)
    standard = np.array([mixing_weights(3, "standard", 3, 5, rng) for _ in range(4000)])
    for view in (0, 1):  # the middle frame's weight
        assert stats.kstest(standard[:, view, 1], stats.beta(3, 5).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(standard[:, 0, 1], standard[:, 1, 1])[0, 1]) < 0.05  # of its own in each view
    skewed = np.array([mixing_weights(5, "standard", 0.5, 2, rng) for _ in range(4000)])
    assert stats.kstest(skewed[:, 0, 2], stats.beta(0.5, 2).cdf).pvalue > 1e-3
    before = skewed[:, 0, 0] / skewed[:, 0, :2].sum(1)  # several frames on a side: uniform between them
    assert stats.kstest(before, stats.uniform.cdf).pvalue > 1e-3

    inner = np.array([mixing_weights(4, "inner", 3, 5, rng) for _ in range(4000)])
    assert (inner > 0).all()  # over all K
    for view in (0, 1):
        for frame in range(4):  # uniform in the simplex: marginals are Beta(1, K - 1)
            assert stats.kstest(inner[:, view, frame], stats.beta(1, 3).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(inner[:, 0, 0], inner[:, 1, 0])[0, 1]) < 0.05


def problem(n=4, k=3, px=20, seed=0, augment_first=False):
    rng = np.random.default_rng(seed)
    frames = torch.from_numpy(rng.integers(0, 256, (n, k, px, px), dtype=np.uint8))
    mix = torch.tensor([mixing_weights(k, "inner", 3, 5, rng) for _ in range(n)])
    shape = (n, 2, k) if augment_first else (n, 2)
    return frames, mix, torch.from_numpy(augment.draw(shape, rng))


def pixels(views):
    return views * STD + MEAN


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_views_lie_in_the_hull_of_the_frames(k):
    frames, mix, _ = problem(k=k)
    views = pixels(make_views(frames, mix, torch.tensor(IDENTITY).expand(4, 2, 8), 20, 1)).view(2, 4, 20, 20)
    grey = frames.double() / 255
    assert (views >= grey.amin(1) - 1e-5).all() and (views <= grey.amax(1) + 1e-5).all()
    for i in range(4):
        for view in (0, 1):
            mixed = sum(w * frame for w, frame in zip(mix[i, view].double(), grey[i]))
            torch.testing.assert_close(views[view, i].double(), mixed, rtol=0, atol=2e-6)


def one(image, parameters, size):
    return augment.apply(image[None], parameters[None], size)[0]


def test_mix_then_augment_equals_the_naive_loop():
    frames, mix, parameters = problem()
    views = make_views(frames, mix, parameters, 16, 3)
    assert views.shape == (8, 3, 16, 16) and views.dtype == torch.float32
    assert views.is_contiguous(memory_format=torch.channels_last)
    for i in range(4):
        for view in (0, 1):
            mixed = sum(mix[i, view, j] * frames[i, j] / 255 for j in range(3))
            expected = (one(mixed, parameters[i, view], 16) - MEAN) / STD
            for channel in range(3):  # all N first views, then all N second views
                torch.testing.assert_close(views[view * 4 + i, channel], expected, rtol=0, atol=1e-5)


def test_augment_then_mix_equals_the_naive_loop():
    frames, mix, parameters = problem(augment_first=True)
    views = make_views(frames, mix, parameters, 16, 1)
    for i in range(4):
        for view in (0, 1):
            augmented = [one(frames[i, j] / 255, parameters[i, view, j], 16) for j in range(3)]
            expected = (sum(w * image for w, image in zip(mix[i, view], augmented)) - MEAN) / STD
            torch.testing.assert_close(views[view * 4 + i, 0], expected, rtol=0, atol=1e-5)


def test_both_orders_agree_where_the_augmentation_is_linear():
    frames, mix, parameters = problem()
    parameters[..., 5:] = 1  # crop and flip only
    after = make_views(frames, mix, parameters[:, :, None].expand(-1, -1, 3, -1), 16, 1)
    torch.testing.assert_close(make_views(frames, mix, parameters, 16, 1), after, rtol=0, atol=1e-5)
