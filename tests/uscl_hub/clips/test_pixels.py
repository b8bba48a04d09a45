"""The right pixels and times of files that are odd but readable, or a note that says what was done."""

import fractions
import io

import av
import numpy as np
import pydicom
import pytest
from helpers import dicom, movie, one
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate

from uscl_hub.clips import find_clips, iter_frames
from uscl_hub.clips.alike import headers
from uscl_hub.clips.decode import decode
from uscl_hub.clips.read import read_clip


def read(path):
    """uint8 (T, H, W), fps, notes, times."""
    notes, times = [], []
    (clip,) = find_clips([path], "clip")
    found = list(iter_frames(clip, notes=notes, times=times))
    return np.stack([frame for frame, _ in found]), found[-1][1], notes, times


def near(a, b, most=6):
    return a.shape == b.shape and np.abs(a.astype(int) - b).mean() < most


def changed(path, **tags):
    data = pydicom.dcmread(path)
    for key, value in tags.items():
        if value is None:
            delattr(data, key)
        else:
            setattr(data, key, value)
    data.save_as(path)
    return path


def jpegs(path, frames, photometric=None, strip=False, **tags):
    parts = []
    for frame in frames:
        buffer = io.BytesIO()
        Image.fromarray(frame).convert("RGB" if photometric else "L").save(buffer, "jpeg", quality=95)
        content = buffer.getvalue()
        if strip:  # the JFIF marker, which says that the colours are YCbCr
            content = content[:2] + content[4 + int.from_bytes(content[4:6], "big") :]
        parts.append(content)
    dicom(path, np.repeat(frames[..., None], 3, -1) if photometric else frames, photometric or "MONOCHROME2")
    data = pydicom.dcmread(path)
    data.PixelData = encapsulate(parts)
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    data.save_as(path)
    return changed(path, **tags)


@pytest.mark.parametrize("frames", [None, "0", "2"])
@pytest.mark.parametrize("make", [dicom, jpegs])
def test_all_frames_whatever_their_number_is_said_to_be(tmp_path, make, frames):
    path = changed(make(tmp_path / "a.dcm", movie()), NumberOfFrames=frames)
    found, _, notes, _ = read(path)
    assert near(found, movie(), 2)
    assert notes == (["its header says 2 frames, 6 are in it"] if frames == "2" else [])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("count", [1, 6])
def test_native_ybr_422(tmp_path, packed, count):
    grey = movie(count)
    full = np.stack([np.array(Image.fromarray(f).convert("RGB").convert("YCbCr")) for f in grey])
    path = dicom(tmp_path / "a.dcm", full, "YBR_FULL_422")
    if packed:
        pairs = np.stack([full[:, :, 0::2, 0], full[:, :, 1::2, 0], full[:, :, 0::2, 1], full[:, :, 0::2, 2]], -1)
        changed(path, PixelData=pairs.tobytes())
    assert near(read(path)[0], grey, 2)


@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL_422", "YBR_PARTIAL_422", "YBR_PARTIAL_420"])
@pytest.mark.parametrize("strip", [True, False])
def test_jpeg_colours_are_what_the_jpeg_says(tmp_path, photometric, strip):
    assert near(read(jpegs(tmp_path / "a.dcm", movie(), photometric, strip))[0], movie(), 3)


@pytest.mark.parametrize(
    "syntax, container, codec",
    [("MPEG2MPML", "mpeg", "mpeg2video"), ("MPEG4HP41", "mp4", "libx264"), ("HEVCMP51", "mp4", "libx265")],
)
def test_video_codecs_inside_dicom(tmp_path, syntax, container, codec):
    if codec not in av.codecs_available:
        pytest.skip(codec)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 128, 192, "yuv420p"
        for frame in movie(6, 128, 192):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "gray")))
        out.mux(stream.encode(None))
    path = dicom(tmp_path / "a.dcm", np.zeros((6, 128, 192, 3), np.uint8), "YBR_PARTIAL_420")
    data = pydicom.dcmread(path)
    data.PixelData = encapsulate([buffer.getvalue()])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    data.save_as(path)
    assert near(read(path)[0], movie(6, 128, 192))


@pytest.mark.parametrize("kind", ["no preamble", "explicit", "implicit"])
def test_dicom_without_preamble_or_meta(tmp_path, kind):
    path = dicom(tmp_path / "a.dcm", movie())
    if kind == "no preamble":
        path.write_bytes(path.read_bytes()[132:])
    else:
        data = pydicom.dcmread(path)
        del data.file_meta
        data.save_as(path, implicit_vr=kind == "implicit", little_endian=True, enforce_file_format=False)
    assert np.array_equal(read(path)[0], movie())
    assert [clip.kind for clip in find_clips([path.rename(tmp_path / "IM0001")])] == ["dicom"]


@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 100, "WindowWidth": 0},
        {"RescaleSlope": 0, "RescaleIntercept": 5, "WindowCenter": 128, "WindowWidth": 256},
        {"RescaleSlope": "1e308", "RescaleIntercept": "0", "WindowCenter": 128, "WindowWidth": 256},
    ],
)
def test_windows_and_rescale_values_that_make_no_sense(tmp_path, tags):
    found, _, notes, _ = read(dicom(tmp_path / "a.dcm", movie(), **tags))
    assert np.abs(found.astype(int) - movie()).max() <= 1
    assert notes == ["its window or rescale values cannot be used: shown without them"]


def test_negative_rescale_slope_shows_the_negative(tmp_path):
    tags = {"RescaleSlope": -1, "RescaleIntercept": 255, "WindowCenter": 128, "WindowWidth": 256}
    found = read(dicom(tmp_path / "a.dcm", movie(), **tags))[0]
    assert np.abs(found.astype(int) - (255 - movie())).max() <= 1


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize("syntax", ["ExplicitVRLittleEndian", "ImplicitVRLittleEndian"])
@pytest.mark.parametrize("which", ["VOILUTSequence", "ModalityLUTSequence"])
def test_tables_of_grey_levels(tmp_path, which, syntax, vr):
    """The negative, by a table to 8 bits that is shown, or by one to 16 bits whose result a window shows whole."""
    bits = 8 if which == "VOILUTSequence" else 16
    values = np.arange(255, -1, -1) * (1 if bits == 8 else 257)
    table = Dataset()
    table.LUTDescriptor = [256, 0, bits]
    table.add_new("LUTData", vr, values.astype("<u2").tobytes() if vr == "OW" else values.tolist())
    window = {} if bits == 8 else {"WindowCenter": 32768, "WindowWidth": 65536}
    path = dicom(tmp_path / "a.dcm", movie(), **window)
    data = pydicom.dcmread(path)
    setattr(data, which, [table])
    data.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    pydicom.dcmwrite(path, data, implicit_vr=syntax.startswith("Implicit"), little_endian=True)
    found, _, notes, _ = read(path)
    assert np.abs(found.astype(int) - (255 - movie())).max() <= 1 and not notes


@pytest.mark.parametrize("shared", [True, False])
def test_windows_in_functional_groups(tmp_path, shared):
    """The same picture as with the window in the file itself, and frame by frame where frames have their own."""
    want = [read(dicom(tmp_path / f"{c}.dcm", movie(2), WindowCenter=c, WindowWidth=60))[0] for c in (100, 160)]
    groups = []
    for center in (100, 160):
        window, group = Dataset(), Dataset()
        window.WindowCenter, window.WindowWidth = center, 60
        group.FrameVOILUTSequence = [window]
        groups.append(group)
    name = "SharedFunctionalGroupsSequence" if shared else "PerFrameFunctionalGroupsSequence"
    found = read(dicom(tmp_path / "a.dcm", movie(2), **{name: groups[:1] if shared else groups}))[0]
    assert np.array_equal(found[0], want[0][0])
    assert np.array_equal(found[1], want[0 if shared else 1][1]) and not np.array_equal(want[0], want[1])


def test_frame_time_vector(tmp_path):
    _, fps, _, times = read(dicom(tmp_path / "a.dcm", movie(4), FrameTimeVector=[0, 40, 40, 120]))
    assert times == pytest.approx([0, 0.04, 0.08, 0.2]) and fps == pytest.approx(15)


@pytest.mark.parametrize("extension", ["tif", "webp", "png"])
def test_numbered_files_of_several_pages_are_recordings(tmp_path, extension):
    for number in (1, 2, 3):
        pages = [Image.fromarray(frame) for frame in movie()]
        pages[0].save(tmp_path / f"a{number}.{extension}", save_all=True, append_images=pages[1:])
    clips = find_clips([tmp_path])
    assert [clip.kind for clip in clips] == ["image"] * 3 and all(len(decode(clip)[0]) == 6 for clip in clips)
    (clip,) = find_clips([tmp_path], frames="clip")
    with pytest.warns(UserWarning, match="only the first frame of each"):
        assert len(decode(clip)[0]) == 3


def test_a_jpeg_with_a_preview_in_it_is_one_picture(tmp_path):
    frames = [Image.fromarray(frame) for frame in movie(6)]
    for i in range(3):
        frames[i].save(tmp_path / f"{i}.jpg", "MPO", save_all=True, append_images=[frames[5]])
    assert len(decode(find_clips([tmp_path / "1.jpg"])[0])[0]) == 1
    found, _, notes, _ = read(tmp_path)
    assert near(found, movie(6)[:3]) and not notes
    assert headers(sorted(tmp_path.iterdir())) == ({movie(1)[0].shape[::-1]}, 1)


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_rate_and_times_of_animations(tmp_path, extension):
    frames = [Image.fromarray(frame) for frame in movie(4)]
    durations = [40, 40, 40, 40] if extension == "png" else [40, 40, 120, 40]
    frames[0].save(tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:], duration=durations)
    found, fps, _, times = read(tmp_path / f"a.{extension}")
    assert len(found) == 4 and fps == 25
    assert times == pytest.approx(np.cumsum([0, *durations[:3]]) / 1000)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("compress", [None, "rle"])
def test_dicom_of_sixteen_bits_that_hold_fewer(tmp_path, bits, signed, compress):
    """Without a window nothing says what is white: the whole clip's values do, where bits are left empty."""
    rng = np.random.default_rng(0)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    deep = rng.integers(low, high, (3, 40, 60)).astype(np.int16 if signed else np.uint16)
    deep[0], deep[1, 0, 0], deep[1, 0, 1] = 0, low, high - 1  # the first frame is black: it must not decide
    codec = {"compress": pydicom.uid.RLELossless} if compress and not signed else {}
    frames, _, notes, _ = read(dicom(tmp_path / "a.dcm", deep, **codec))
    expected = np.rint((deep.astype(float) - low) * 255 / (high - 1 - low))
    assert np.abs(frames - expected).max() <= 1 and len(notes) == (bits < 16)
    assert bits == 16 or f"hold values of {bits} bits" in notes[0]
    window = {"WindowCenter": 100, "WindowWidth": 50}
    shown, _, notes, _ = read(dicom(tmp_path / "b.dcm", deep, **window))
    assert notes == [] and set(np.unique(shown)) >= {0, 255}


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("extension, numbered", [("png", False), ("png", True), ("tif", False)])
def test_sixteen_bit_files_that_hold_fewer(tmp_path, bits, extension, numbered):
    frames = movie(3)
    deep = (frames.astype(np.float64) / 255 * (2**bits - 1)).round().astype(np.uint16)
    for i, frame in enumerate(deep if numbered else deep[-1:]):
        Image.fromarray(frame).save(tmp_path / f"a{i if numbered else ''}.{extension}")
    found, _, notes, _ = read(tmp_path)
    assert np.abs(found.astype(int) - (frames if numbered else frames[-1:])).max() <= 1
    assert len(notes) == (bits < 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "tif"])
def test_exif_orientation(tmp_path, orientation, extension):
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = Image.fromarray(movie(1)[0])
    grey.save(tmp_path / f"a.{extension}", exif=exif, **({"lossless": True} if extension == "webp" else {}))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # of Image.Transpose
    want = grey.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else grey
    assert near(read(tmp_path / f"a.{extension}")[0], np.array(want)[None], 2)


def test_the_video_and_not_a_preview_that_comes_first(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as out:
        small, large = out.add_stream("mjpeg", rate=1), out.add_stream("libx264", rate=20)
        small.height, small.width, small.pix_fmt = 24, 32, "yuvj420p"
        large.height, large.width, large.pix_fmt = 48, 64, "yuv420p"
        for stream, frames in ((small, movie(1, 24, 32)), (large, movie())):
            for frame in frames:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "gray")))
            out.mux(stream.encode(None))
    assert near(read(tmp_path / "a.mkv")[0], movie())


def test_times_of_a_video_of_variable_rate(tmp_path):
    milliseconds = [0, 40, 80, 600, 640, 680]
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for frame, pts in zip(movie(), milliseconds, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, "gray").reformat(format="yuv420p")
            picture.pts, picture.time_base = pts, fractions.Fraction(1, 1000)
            out.mux(stream.encode(picture))
        out.mux(stream.encode(None))
    assert read(tmp_path / "a.mp4")[3] == pytest.approx(np.array(milliseconds) / 1000, abs=0.002)
    assert read_clip(one(tmp_path / "a.mp4"), 32, stride=3).times == pytest.approx((0, 0.6), abs=0.002)
