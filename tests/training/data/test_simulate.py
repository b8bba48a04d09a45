import hashlib

import numpy as np
import pytest

from training.data.simulate import KINDS, add_interface, simulate_clip, write_demo
from uscl_hub.clips import find_clips
from uscl_hub.clips.crop import detect_region
from uscl_hub.clips.decode import decode


@pytest.mark.parametrize("kind", KINDS)
def test_clip(kind):
    clip = simulate_clip(kind, 6, 64, seed=3)
    assert clip.shape == (6, 64, 64) and clip.dtype == np.uint8
    assert np.array_equal(clip, simulate_clip(kind, 6, 64, seed=3))
    assert not np.array_equal(clip, simulate_clip(kind, 6, 64, seed=4))
    assert 20 < clip[:, clip.any(0)].mean() < 200
    step = np.abs(clip[1:].astype(int) - clip[:-1])[:, clip.any(0)].mean()
    assert step > 2  # it moves


def test_neighbouring_frames_are_alike_and_subjects_differ():
    a, b = (simulate_clip("cyst", 12, 64, seed=s, subject=1).astype(float) for s in (0, 1))
    other = simulate_clip("cyst", 12, 64, seed=0, subject=2).astype(float)

    def corr(x, y):
        return np.corrcoef(x.ravel(), y.ravel())[0, 1]

    assert corr(a[0], a[1]) > corr(a[0], a[11]) - 0.05
    assert corr(a.mean(0), b.mean(0)) > corr(a.mean(0), other.mean(0))


def test_speckle_is_fully_developed_and_kinds_share_it():
    """The envelope's contrast (deviation over mean) in homogeneous speckle is 0.52 (Rayleigh)."""
    from training.data.simulate.scanner import acquire, make_probe
    from training.data.simulate.scenes import Scene

    class Plain(Scene):
        def build(self, anatomy):
            pass

        def echo(self, x, z):
            return np.ones_like(x)

    contrast = []
    for subject in range(4):
        probe = make_probe(np.random.default_rng(subject), 96)
        rng = np.random.default_rng(0)
        polar = acquire(Plain(np.random.default_rng(1), rng, 1), probe, 1, rng)[0]
        middle = polar[40:100, 10:-10].astype(float)
        envelope = 10 ** ((middle - 1) * probe["dynamic"] / 20)
        envelope /= envelope.mean(1, keepdims=True)
        contrast.append(envelope.std())
    assert np.mean(contrast) == pytest.approx(0.52, abs=0.06)


def test_both_geometries_for_every_kind():
    for kind in KINDS:
        corners = {
            bool(
                simulate_clip(kind, 1, 32, seed=0, subject=s)[0, -8:, 14:18].any()
                and simulate_clip(kind, 1, 32, seed=0, subject=s)[0, :2, 14:18].any()
            )
            for s in range(12)
        }
        assert corners == {True, False}, kind


def test_bad_arguments():
    with pytest.raises(ValueError, match="brain"):
        simulate_clip("brain", 4, 64, 0)
    with pytest.raises(ValueError, match="size at least 16"):
        simulate_clip("lung", 4, 8, 0)


def test_demo_files(tmp_path):
    out = write_demo(tmp_path / "demo", clips=12, frames=5, size=48, seed=1)
    clips = find_clips([out])
    assert len(clips) == 12
    assert {clip.id.split("/")[1] for clip in clips} == set(KINDS)
    assert clips[0].id == "demo/cyst/subj00_clip00.mp4"
    assert not list(out.rglob(".*"))
    frames, fps = decode(clips[0])
    assert len(frames) == 5 and fps == 15
    hashes = {hashlib.sha256(clip.files[0].read_bytes()).digest() for clip in clips}
    assert len(hashes) == 12
    again = write_demo(tmp_path / "again", clips=12, frames=5, size=48, seed=1)
    for a, b in zip(clips, find_clips([again])):
        assert np.array_equal(decode(a)[0], decode(b)[0])


def test_interface_is_static_and_found():
    movie = simulate_clip("lesion", 12, 96, seed=0, subject=1)
    framed = add_interface(movie, seed=2)
    assert framed.shape[1] > 96 and framed.shape[1] % 2 == framed.shape[2] % 2 == 0
    region = detect_region(framed)
    assert (region.bottom - region.top) * (region.right - region.left) < 0.75 * framed[0].size


def test_kinds_can_be_told_apart_between_subjects():
    """A nearest-neighbour probe on blurred frames, subjects held out: above chance (0.2), below trivial."""
    from uscl_hub.preprocess import resize

    vectors, labels, subjects = [], [], []
    for k, kind in enumerate(KINDS):
        for subject in range(12):
            frame = simulate_clip(kind, 1, 48, seed=0, subject=100 * k + subject)[0]
            vectors.append(resize(frame, 12).astype(float).ravel())
            labels.append(k)
            subjects.append(subject)
    x = np.stack(vectors)
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    distance = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.fill_diagonal(distance, np.inf)
    right = np.mean([labels[i] == labels[j] for i, j in enumerate(distance.argmin(1))])
    assert 0.3 < right < 1
