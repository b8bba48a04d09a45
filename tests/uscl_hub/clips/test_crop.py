import numpy as np
import pytest
from helpers import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from training.data.simulate import simulate_clip
from uscl_hub.clips import find_clips
from uscl_hub.clips.crop import (
    Region,
    apply_region,
    detect_region,
    sample,
)
from uscl_hub.clips.decode import decode
from uscl_hub.clips.pictures import before_after, contact_sheet
from uscl_hub.clips.text import burned_in_text_suspected


def screen(movie, top, left, height, width, text="JANE DOE 1970", at=(4, 4), background=0):
    canvas = Image.new("L", (width, height), background)
    ImageDraw.Draw(canvas).text(at, text, fill=240, font=ImageFont.load_default(16))
    framed = np.repeat(np.asarray(canvas)[None], len(movie), 0)
    framed[:, top : top + movie.shape[1], left : left + movie.shape[2]] = movie
    return framed


def speckle(t=16, h=160, w=200, seed=0):
    return np.random.default_rng(seed).integers(30, 160, (t, h, w)).astype(np.uint8)


@pytest.mark.parametrize("background", [0, 45])
def test_moving_area_is_found_and_text_is_left_out(background):
    framed = screen(speckle(), 60, 90, 280, 360, background=background)
    region = detect_region(framed)
    assert region.top <= 60 and region.left <= 90 and region.bottom >= 220 and region.right >= 290  # no tissue lost
    assert region.top > 50 and region.left > 75 and region.bottom < 235 and region.right < 305
    assert burned_in_text_suspected(framed)
    assert not burned_in_text_suspected(apply_region(framed, region))


def test_text_beside_a_sector_inside_its_box_is_blanked():
    movie = simulate_clip("lesion", 16, 192, seed=1, subject=1)
    if not (movie[:, :8, :8] == 0).all():
        pytest.skip("not a sector")
    framed = np.maximum(movie, screen(movie * 0, 192, 0, 192 * 2, 192, "DOE", at=(2, 2))[:, :192])
    region = detect_region(framed)
    after = apply_region(framed, region, "crop")
    assert framed[:, 2:20, 2:30].max() > 200 and apply_region(framed, region, "blank")[:, 2:20, 2:30].max() == 0
    assert after.sum() >= 0.98 * movie.sum()  # and hardly any tissue


def test_blank_keeps_the_size():
    framed = screen(speckle(), 60, 90, 280, 360)
    region = detect_region(framed)
    blank = apply_region(framed, region, "blank")
    assert blank.shape == framed.shape
    assert blank[:, :40].max() == 0 and np.array_equal(blank[:, 60:220, 90:290], framed[:, 60:220, 90:290])
    assert apply_region(framed, region, "none") is framed
    with pytest.raises(ValueError, match="cut"):
        apply_region(framed, region, "cut")


def test_a_small_moving_clock_does_not_count():
    framed = screen(speckle(), 60, 90, 280, 360)
    framed[:, 255:270, 320:350] = speckle(16, 15, 30, 1)
    region = detect_region(framed)
    assert region.right < 310 and region.bottom < 240


def test_two_views_side_by_side_are_both_kept():
    framed = screen(speckle(w=130), 60, 10, 280, 360)
    framed[:, 60:220, 200:330] = speckle(w=130, seed=2)
    region = detect_region(framed)
    assert region.left <= 10 and region.right >= 330


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((8, 64, 64), np.uint8),
        np.full((8, 64, 64), 90, np.uint8),
        np.zeros((1, 64, 64), np.uint8),
        speckle(8, 64, 64),
        speckle(1, 64, 64),
        speckle(3, 8, 8),
        speckle(2, 2, 300),
    ],
)
def test_whole_frame_when_unsure(frames):
    region = detect_region(frames)
    assert region.box == (0, frames.shape[1], 0, frames.shape[2])
    assert np.array_equal(apply_region(frames, region), frames)


def test_still_image_loses_its_black_border_only():
    frame = np.zeros((1, 300, 400), np.uint8)
    frame[:, 80:240, 100:300] = speckle(1)
    region = detect_region(frame)
    assert region.top <= 80 and region.bottom >= 240 and region.left <= 100 and region.right >= 300
    assert region.top > 65 and region.right < 315


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 70), st.integers(1, 70), st.integers(0, 9), st.sampled_from(["crop", "blank"]))
def test_any_shape(t, h, w, seed, mode):
    frames = (np.random.default_rng(seed).random((t, h, w)) ** 3 * 255).astype(np.uint8)
    region = detect_region(frames)
    assert 0 <= region.top < region.bottom <= h and 0 <= region.left < region.right <= w
    assert apply_region(frames, region, mode).size > 0
    burned_in_text_suspected(frames)


def test_wrong_input():
    with pytest.raises(ValueError, match="float"):
        detect_region(np.zeros((2, 32, 32)))
    with pytest.raises(ValueError, match=r"\(32, 32\)"):
        detect_region(np.zeros((32, 32), np.uint8))


def test_sample_is_even_with_both_ends():
    picked = sample(np.arange(100, dtype=np.uint8)[:, None, None], 5).ravel()
    assert picked[0] == 0 and picked[-1] == 99 and len(picked) == 5


def test_sheet():
    frame = speckle(1)[0]
    region = Region(10, 100, 20, 150)
    tile = before_after("a/b.mp4", frame, region, apply_region(frame, region))
    assert contact_sheet([tile] * 5).size == (4 * 326, 2 * 175)


@pytest.mark.parametrize("text", ["JANE DOE 1970", "gypsy 12:30", "MI 0.4"])
@pytest.mark.parametrize("background", [0, 45])
def test_text_is_found_under_compression_noise(text, background):
    movie = simulate_clip("lung", 16, 192, seed=1, subject=1)
    framed = screen(movie, 60, 90, 280, 360, text, background=background)
    noise = np.random.default_rng(0).normal(0, 3, framed.shape)
    assert burned_in_text_suspected((framed + noise).clip(0, 255).astype(np.uint8))


def test_speckle_is_not_text():
    suspected = [
        burned_in_text_suspected(simulate_clip(kind, 8, 192, seed=s, subject=s))
        for kind in ("lung", "muscle")
        for s in range(3)
    ]
    assert sum(suspected) == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data")
def test_real_clips():
    """Boxes read off the pictures by eye, with some slack: the image area is inside, most of the interface is not."""
    clips = {clip.files[0].name: clip for clip in find_clips([DATA / "pretrain"])}
    for name, inner, outer in [
        ("p6_isokinetic120_01_push_01.mp4", (60, 600, 215, 930), (20, 624, 180, 970)),
        ("sonosite-anon-eye1-video.mp4", (60, 600, 400, 710), (20, 665, 370, 740)),
        ("patient_10_L1.mp4", (10, 340, 10, 340), (0, 350, 0, 350)),
    ]:
        frames, _ = decode(clips[name], max_frames=60)
        top, bottom, left, right = detect_region(frames).box
        assert outer[0] <= top <= inner[0] and inner[1] <= bottom <= outer[1], name
        assert outer[2] <= left <= inner[2] and inner[3] <= right <= outer[3], name
