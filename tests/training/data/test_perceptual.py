"""Hashes of frames survive another encoding and size, and tell pictures apart."""

import io

import numpy as np
import pytest
from PIL import Image

from training.data.perceptual import bits, difference, frame_hashes, positions
from training.data.simulate import simulate_clip


@pytest.fixture(scope="module")
def frames():
    return np.stack([simulate_clip(kind, 1, 96, seed=i)[0] for i, kind in enumerate(["lung", "cyst", "lesion"] * 3)])


def altered(frame):
    """The frame at 0.6 of its size, as JPEG of quality 50."""
    file, side = io.BytesIO(), int(0.6 * len(frame))
    Image.fromarray(frame).resize((side, side)).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))


def test_the_same_picture_is_near_and_others_are_far(frames):
    for i, frame in enumerate(frames):
        assert difference(frame, frame) == 0 and difference(frame, altered(frame)) <= 20
        assert min(difference(frame, other) for j, other in enumerate(frames) if j != i) > 50


def test_distances_of_many_are_those_of_two(frames):
    rows = bits([frame_hashes(frame[None])[0] for frame in frames])
    distance = (rows.shape[1] - rows @ rows.T) / 2
    assert distance[0].tolist() == [difference(frames[0], frame) for frame in frames]
    assert bits([]).shape == (0, 256)
    for text in ("00", "zz" * 32):
        with pytest.raises(ValueError):
            bits([text])


def test_frames_of_one_colour_have_no_hash(frames):
    flat = np.full_like(frames[:2], 40)
    assert frame_hashes(flat) == [] and len(frame_hashes(np.concatenate([frames[:1], frames[:1], flat]))) == 1


@pytest.mark.parametrize("length, expected", [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (300, [50, 150, 250])])
def test_positions_are_spread_over_the_clip(length, expected):
    assert positions(length).tolist() == expected
