"""Positive pair generation (PPI; paper, section III-B): views as points inside the convex hull of a clip's frames.

Every view is a convex combination of the K frames drawn from its clip, so a batch of pairs is one weight matrix
(N, 2, K) applied to the frames (N, K, H, W).
"""

import torch

from training.method import augment


def choose_frames(length, k, max_dist, rng):
    """Draw k different frames of a clip, at most `max_dist` apart, in temporal order.

    Args:
        length: frames in the clip, >= 1. A shorter clip than k gives `length` frames.
        k: frames to draw (3 in the paper).
        max_dist: largest distance between the first and the last drawn frame.
        rng: numpy Generator.

    Returns:
        A sorted list of min(k, length, max_dist + 1) frame numbers.
    """
    k = min(k, length, max_dist + 1)
    span = min(length, max_dist + 1)
    start = rng.integers(length - span + 1)
    return sorted((start + rng.choice(span, size=k, replace=False)).tolist())


def mixing_weights(k, mode, alpha, beta, rng):
    """Convex weights of k frames in the two views, a list of two lists of k floats that sum to 1.

    k = 1: one frame twice. k = 2: the two frames (both as in the paper's ablation, whatever the mode). k >= 3:
    'standard': each view mixes the middle frame, with a weight from Beta(alpha, beta) of its own, with the frames
    before it (first view) or after it (second view); where these are several, a uniform random point of their
    hull takes part. 'inner': two independent uniform points of the hull of all k frames.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ("standard", "inner"):
        raise ValueError(f"pairs.mode: 'standard' or 'inner', not {mode!r}")
    if k == 1:
        return [[1.0], [1.0]]
    if k == 2:
        return [[1.0, 0.0], [0.0, 1.0]]
    if mode == "inner":
        return rng.dirichlet([1.0] * k, size=2).tolist()
    middle = k // 2
    to_middle = rng.beta(alpha, beta, size=2)
    before = (1 - to_middle[0]) * rng.dirichlet([1.0] * middle)
    after = (1 - to_middle[1]) * rng.dirichlet([1.0] * (k - 1 - middle))
    return [
        [*before, to_middle[0], *[0.0] * len(after)],
        [*[0.0] * len(before), to_middle[1], *after],
    ]


def make_views(frames, mix, parameters, size, channels):
    """Mix and augment, on the device of `frames`.

    Args:
        frames: uint8 (N, K, S, S).
        mix: float32 (N, 2, K), the convex weights.
        parameters: augmentations (see `augment.draw`): (N, 2, 8) to augment the mixed views, or (N, 2, K, 8) to
            augment every frame on its own before mixing.
        size: pixels of the views' sides.
        channels: the grey view is repeated to so many channels.

    Returns:
        Normalised float32 views (2N, channels, size, size) in channels_last: N first views, N second views.
    """
    n, k = frames.shape[:2]
    frames = frames.float() / 255
    if parameters.ndim == 4:
        images = frames[:, None].expand(n, 2, k, *frames.shape[2:])
        images = augment.apply(images.flatten(0, 2), parameters.flatten(0, 2), size).view(n, 2, k, size, size)
        views = torch.einsum("nvk,nvkhw->vnhw", mix, images)
    else:
        images = torch.einsum("nvk,nkhw->vnhw", mix, frames)
        views = augment.apply(images.flatten(0, 1), parameters.transpose(0, 1).flatten(0, 1), size)
    views = augment.normalise(views.reshape(2 * n, 1, size, size))
    return views.expand(-1, channels, -1, -1).contiguous(memory_format=torch.channels_last)
