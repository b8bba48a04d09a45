import struct
import warnings

import numpy as np
import pytest
from helpers import dicom, movie, one, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from uscl_hub.clips import UnreadableClip, find_clips, iter_frames
from uscl_hub.clips.decode import decode
from uscl_hub.clips.video import video_grey

av = pytest.importorskip("av")
pydicom = pytest.importorskip("pydicom")


@pytest.mark.parametrize(
    "name, codec",
    [("a.mp4", "mpeg4"), ("a.AVI", "mpeg4"), ("a.mov", "mpeg4"), ("a.mpeg", "mpeg2video"), ("a.webm", "libvpx")],
)
def test_video_formats(tmp_path, name, codec):
    if codec not in av.codecs_available:
        pytest.skip(codec)
    clip = one(write(tmp_path / name.lower(), movie(), codec, fps=25).rename(tmp_path / name))
    frames, fps = decode(clip)
    assert clip.kind == "video" and frames.shape == (6, 48, 64) and fps == pytest.approx(25, abs=0.1)
    assert np.abs(frames.astype(int) - movie()).mean() < 6  # full range: not 16..235
    assert decode(clip, max_frames=2, stride=3)[0].shape[0] == 2
    assert np.array_equal(decode(clip, stride=3)[0], frames[::3])


def test_gif_and_its_frame_rate(tmp_path):
    pictures = [Image.fromarray(f) for f in movie()]
    pictures[0].save(tmp_path / "a.GIF", save_all=True, append_images=pictures[1:], duration=50)
    frames, fps = decode(one(tmp_path / "a.GIF"))
    assert frames.shape == (6, 48, 64) and fps == 20
    assert np.abs(frames.astype(int) - movie()).max() <= 2


def test_rotated_video(tmp_path):
    path = write(tmp_path / "a.mp4", movie(), "mpeg4")
    plain = decode(one(path))[0]
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the display matrix: 90 degrees clockwise
    data[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert np.array_equal(decode(one(path))[0], np.rot90(plain, -1, (1, 2)))


def test_odd_sizes_and_one_frame(tmp_path):
    path = write(tmp_path / "a.avi", movie(1, 47, 63), "ffv1", pix_fmt="gray")
    assert np.array_equal(decode(one(path))[0], movie(1, 47, 63))


def test_frame_folder_in_natural_order(tmp_path):
    folder = tmp_path / "scan" / "deep"
    folder.mkdir(parents=True)
    for i in (1, 2, 9, 10, 100):
        Image.new("L", (20, 16), i).save(folder / f"frame{i}.png")
        Image.new("L", (20, 16), 200).save(folder / f"{i:05d}.JPG")
    Image.new("L", (20, 16), 7).save(folder / "still.png")
    clips = {clip.id: clip for clip in find_clips([tmp_path / "scan"])}
    assert sorted(clips) == ["scan/deep/#.jpg", "scan/deep/frame#.png", "scan/deep/still.png"]
    frames, fps = decode(clips["scan/deep/frame#.png"])
    assert frames[:, 0, 0].tolist() == [1, 2, 9, 10, 100] and fps is None
    assert decode(clips["scan/deep/frame#.png"], stride=2, max_frames=2)[0][:, 0, 0].tolist() == [1, 9]
    assert clips["scan/deep/still.png"].kind == "image" and clips["scan/deep/#.jpg"].kind == "frames"


@settings(max_examples=30, deadline=None)
@given(
    numbers=st.lists(st.integers(0, 2000), min_size=2, max_size=12, unique=True),
    before=st.text("ab_- .", max_size=4).filter(lambda text: not text.startswith(".")),
    after=st.text("xy-", max_size=2),
    digits=st.integers(1, 6),
)
def test_any_numbering_is_one_clip_in_the_numbers_order(tmp_path_factory, numbers, before, after, digits):
    root = tmp_path_factory.mktemp("n")
    for number in numbers:
        Image.new("L", (8, 8), number % 251).save(root / f"{before}{number:0{digits}d}{after}.png")
    (clip,) = find_clips([root])
    assert clip.kind == "frames" and not clip.id.startswith("/") and ".." not in clip.id.split("/")
    assert decode(clip)[0][:, 0, 0].tolist() == [number % 251 for number in sorted(numbers)]


def test_numbered_images_of_different_sizes_are_separate(tmp_path):
    for i, width in enumerate((20, 30, 40)):
        Image.new("L", (width, 16)).save(tmp_path / f"benign ({i}).png")
    assert [clip.kind for clip in find_clips([tmp_path])] == ["image"] * 3


def test_a_frame_of_another_size_is_resized_with_a_warning(tmp_path):
    for i in range(30):
        Image.new("L", (20 if i != 2 else 24, 16), i).save(tmp_path / f"{i}.png")
    with pytest.warns(UserWarning, match="resized to the first, 20 x 16"):
        frames, _ = decode(one(tmp_path))
    assert frames.shape == (30, 16, 20) and frames[2, 0, 0] == 2


def test_ids_sources_and_order(tmp_path):
    for place in ("a/videos/x", "b/videos/x", "b/.hidden"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / place / "i.png")
    (tmp_path / "a" / "videos" / "notes.txt").write_text("no clip")
    assert [c.id for c in find_clips([tmp_path / "a" / "videos"])] == ["videos/x/i.png"]
    both = find_clips([tmp_path / "b" / "videos", tmp_path / "a" / "videos", tmp_path / "a" / "videos"])
    assert [(c.id, c.source) for c in both] == [("a/videos/x/i.png", "a/videos"), ("b/videos/x/i.png", "b/videos")]
    (tmp_path / "a" / "videos" / "loop").symlink_to(tmp_path / "a")
    assert len(find_clips([tmp_path / "a" / "videos"])) == 1
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_clips([tmp_path / "nowhere"])


# ---------------------------------------------------------------------------------------------------- DICOM


@pytest.mark.parametrize("syntax, exact", [(None, True), ("RLELossless", True), ("JPEG2000Lossless", True)])
def test_dicom_multi_frame(tmp_path, syntax, exact):
    path = dicom(tmp_path / "a.DCM", movie(), compress=getattr(pydicom.uid, syntax) if syntax else None, FrameTime=40)
    frames, fps = decode(one(path))
    assert np.array_equal(frames, movie()) and fps == 25
    assert len(decode(one(path), max_frames=2, stride=2)[0]) == 2


def test_dicom_jpeg_baseline(tmp_path):
    import io

    from pydicom.encaps import encapsulate

    parts = []
    for grey in movie():
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "jpeg", quality=95)
        parts.append(buffer.getvalue())
    path = dicom(tmp_path / "a.dcm", movie())
    data = pydicom.dcmread(path)
    data.PixelData = encapsulate(parts)
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    data.save_as(path)
    assert np.abs(decode(one(path))[0].astype(int) - movie()).mean() < 2


def test_dicom_inverted_deep_signed_windowed(tmp_path):
    grey = movie()
    assert np.array_equal(decode(one(dicom(tmp_path / "1.dcm", grey, "MONOCHROME1")))[0], 255 - grey)
    assert np.array_equal(decode(one(dicom(tmp_path / "2.dcm", grey.astype(np.uint16) * 257)))[0], grey)
    twelve = decode(one(dicom(tmp_path / "3.dcm", grey.astype(np.uint16) * 16, bits=12)))[0]
    assert np.abs(twelve.astype(int) - grey).max() <= 1
    signed = decode(one(dicom(tmp_path / "4.dcm", ((grey.astype(np.int32) - 128) * 256).astype(np.int16))))[0]
    assert np.abs(signed.astype(int) - grey).max() <= 1
    window = decode(one(dicom(tmp_path / "5.dcm", grey, WindowCenter=128, WindowWidth=256)))[0]
    assert np.abs(window.astype(int) - grey).max() <= 1


def test_dicom_colour_and_palette(tmp_path):
    rgb = np.stack([movie(), movie() // 2, movie() // 3], -1)
    want = np.stack([np.array(Image.fromarray(f).convert("L")) for f in rgb])
    assert np.array_equal(decode(one(dicom(tmp_path / "1.dcm", rgb, "RGB")))[0], want)
    ybr = np.stack([np.array(Image.fromarray(f).convert("YCbCr")) for f in rgb])
    assert np.abs(decode(one(dicom(tmp_path / "2.dcm", ybr, "YBR_FULL")))[0].astype(int) - want).max() <= 3
    table = (np.arange(256)[::-1] * 257).astype("<u2").tobytes()
    tags = {
        f"{c}PaletteColorLookupTable{x}": v
        for c in ("Red", "Green", "Blue")
        for x, v in (("Descriptor", [256, 0, 16]), ("Data", table))
    }
    assert (
        np.abs(
            decode(one(dicom(tmp_path / "3.dcm", movie(), "PALETTE COLOR", **tags)))[0].astype(int)
            - (255 - movie().astype(int))
        ).max()
        <= 1
    )


def test_dicom_without_extension(tmp_path):
    dicom(tmp_path / "IM_0001", movie())
    (tmp_path / "README").write_text("x" * 200)
    assert [clip.kind for clip in find_clips([tmp_path])] == ["dicom"]


def test_nothing_of_a_dicom_file_is_quoted(tmp_path, caplog):
    path = dicom(tmp_path / "a.dcm", movie())
    whole = path.read_bytes()
    for cut in range(140, len(whole), 997):
        path.write_bytes(whole[:cut])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                decode(one(path))
                text = ""
            except UnreadableClip as error:
                text = str(error)
        assert "PLANTED" not in text + caplog.text + "".join(str(w.message) for w in caught)


def test_streaming_stops_early(tmp_path):
    frames = iter_frames(one(write(tmp_path / "a.mp4", movie(), "mpeg4")))
    assert next(frames)[0].shape == (48, 64)
    frames.close()


@pytest.mark.parametrize("name", ["yuv420p", "yuvj420p", "yuv422p", "yuv444p", "nv12", "gray", "yuv420p10le", "rgb24"])
def test_grey_is_what_ffmpeg_makes_of_it(name):
    rng = np.random.default_rng(0)
    for color_range, colorspace in ((0, 2), (1, 2), (2, 2), (0, 1), (1, 5)):  # full or limited; BT.709 mixes colour in
        frame = av.VideoFrame(70, 50, name)
        frame.color_range, frame.colorspace = color_range, colorspace
        for plane in frame.planes:
            plane.update(rng.integers(0, 4 if "10" in name else 256, plane.buffer_size, dtype=np.uint8).tobytes())
        assert np.array_equal(video_grey(frame), frame.to_ndarray(format="gray"))
