"""Broken, renamed and hostile files: a clear reason for each, everything else processed, nothing of a patient's name
anywhere."""

import io
import json
import logging
import os
import pickle
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
import torch
from helpers import dicom, movie, one, write
from PIL import Image

import uscl_hub
from training.data.cache import CacheError
from training.data.ingest import ingest
from training.data.simulate import simulate_clip, write_video
from training.engine import validation as probe
from training.evaluation import backbones, datasets, frames
from training.evaluation.features import to_input
from uscl_hub.cli import main
from uscl_hub.clips import Clip, UnreadableClip, find_clips
from uscl_hub.clips.decode import decode
from uscl_hub.clips.quiet import quiet
from uscl_hub.clips.read import read_clip
from uscl_hub.features.embed import embed

SIZE = 32


def reason(path):
    with pytest.raises(UnreadableClip) as caught:
        decode(one(path))
    assert str(path) in str(caught.value) and "\n" not in caught.value.reason
    return caught.value.reason


def png_header(path, width, height):
    """A valid png whose header claims a size that its data does not have."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mov", "a.mpeg", "a.webm", "a.gif", "a.png", "a.jpg", "a.dcm"])
@pytest.mark.parametrize("content", [b"", b"\0" * 5000, b"#EXTM3U\nhttp://127.0.0.1:9/x.ts\n", bytes(range(256)) * 20])
def test_not_what_its_name_says(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert reason(path)


def test_renamed_files(tmp_path):
    video = write(tmp_path / "a.mp4", movie(), "mpeg4")
    Image.fromarray(movie()[0]).save(tmp_path / "b.png")
    dicom(tmp_path / "c.dcm", movie())
    for source, name in (
        (video, "d.png"),
        (video, "d.dcm"),
        (tmp_path / "b.png", "e.dcm"),
        (tmp_path / "c.dcm", "f.mp4"),
        (tmp_path / "b.png", "g.mp4"),
        (tmp_path / "c.dcm", "h.jpg"),
    ):
        (tmp_path / name).write_bytes(source.read_bytes())
        assert reason(tmp_path / name)
    (tmp_path / "i.avi").write_bytes(video.read_bytes())  # another container's name does no harm
    assert decode(one(tmp_path / "i.avi"))[0].shape == (6, 48, 64)


def test_a_playlist_cannot_read_other_files(tmp_path):
    secret = write(tmp_path / "secret.mp4", movie(), "mpeg4")
    for name, text in (
        ("a.mp4", f"ffconcat version 1.0\nfile {secret}\n"),
        ("b.mp4", f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n"),
    ):
        (tmp_path / name).write_text(text)
        assert reason(tmp_path / name)


def test_too_large_and_too_small(tmp_path):
    assert "8000 x 6000" in reason(png_header(tmp_path / "a.png", 8000, 6000))
    assert "limit" in reason(png_header(tmp_path / "b.png", 60000, 60000))
    Image.new("L", (1, 1)).save(tmp_path / "c.png")
    assert "too small" in reason(tmp_path / "c.png")
    assert reason(png_header(tmp_path / "d.png", 100, 100))


def test_dicom_claims(tmp_path):
    import pydicom

    path = dicom(tmp_path / "a.dcm", movie())
    for tags, text in (
        ({"Rows": 60000, "Columns": 60000}, "limit"),
        ({"NumberOfFrames": 10**8}, "claims 100000000"),
        ({"NumberOfFrames": 50}, "cannot be decoded"),
        ({"Rows": 0}, "too small"),
        ({"BitsAllocated": 16}, "cannot be decoded"),
    ):
        data = pydicom.dcmread(path)
        for key, value in tags.items():
            setattr(data, key, value)
        data.save_as(tmp_path / "b.dcm")
        assert text in reason(tmp_path / "b.dcm")
    data = pydicom.dcmread(path)
    del data.PixelData
    data.save_as(tmp_path / "c.dcm")
    assert "without pixel data" in reason(tmp_path / "c.dcm")


def test_limits_on_frames_and_bytes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4", movie(), "mpeg4")
    monkeypatch.setattr(sys.modules["uscl_hub.clips.decode"], "MAX_BYTES", 4 * 48 * 64)
    assert "decoded frames" in reason(path)
    assert len(decode(one(path), max_frames=3)[0]) == 3
    monkeypatch.setattr(sys.modules["uscl_hub.clips.decode"], "MAX_FRAMES", 3)
    assert "more than 3 frames" in reason(path)


def test_truncated_video(tmp_path):
    path = write(tmp_path / "a.mp4", movie(), "mpeg4")
    path.write_bytes(path.read_bytes()[:-300])
    assert reason(path)
    path = write(tmp_path / "b.avi", movie(), "ffv1", pix_fmt="gray")
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])
    with pytest.warns(UserWarning, match="header says") if _readable(path) else pytest.raises(UnreadableClip):
        decode(one(path))


def test_silence_ends_whatever_the_order_of_threads(tmp_path):
    """DICOM is read in silence; two that overlap must not leave the process silent."""
    logger, filters = logging.getLogger("pydicom"), list(warnings.filters)
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert logger.disabled  # the other one still reads
    second.__exit__(None, None, None)
    assert not logger.disabled and warnings.filters == filters
    files = [one(dicom(tmp_path / f"{i}.dcm", movie(4))) for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, files * 4))
    assert not logger.disabled and warnings.filters == filters


def _readable(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return bool(len(decode(one(path))[0]))
        except UnreadableClip:
            return False


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "LA", "I;16", "YCbCr"])
def test_any_image_mode(tmp_path, mode):
    grey = Image.fromarray(movie()[0])
    if mode == "I;16":
        image = Image.fromarray(movie()[0].astype(np.uint16) * 257)
    else:
        image = grey.quantize(256) if mode == "P" else grey.convert("RGB").convert(mode)
    image.save(tmp_path / "a.tif")
    frames, _ = decode(one(tmp_path / "a.tif"))
    assert frames.shape == (1, 48, 64)
    if mode != "1":
        assert np.abs(frames[0].astype(int) - movie()[0]).max() <= 8


def test_nan_image(tmp_path):
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(tmp_path / "a.tif")
    assert "NaN" in reason(tmp_path / "a.tif")


def test_variable_size_gif(tmp_path):
    a, b = Image.new("P", (40, 30), 1), Image.new("P", (20, 10), 2)
    a.save(tmp_path / "a.gif", save_all=True, append_images=[b], duration=0)
    frames, fps = decode(one(tmp_path / "a.gif"))
    assert frames.shape[1:] == (30, 40) and fps is None


def test_one_bad_frame_in_a_folder_names_the_file(tmp_path):
    for i in range(4):
        Image.new("L", (20, 16), i).save(tmp_path / f"{i}.png")
    (tmp_path / "2.png").write_bytes(b"broken")
    with pytest.raises(UnreadableClip, match=r"2\.png"):
        decode(one(tmp_path))


def test_odd_names(tmp_path):
    for name in ("http:x.mp4", "concat:a|b.mp4", "-i.mp4", "ü%d é.mp4", "a'b\n.mp4", "pipe:0.mp4"):
        write_video(tmp_path / name, movie())
    clips = find_clips([tmp_path])
    assert len(clips) == 6
    assert all(decode(clip)[0].shape == (6, 48, 64) for clip in clips)


def test_names_that_are_not_text(tmp_path, tiny_export, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    for i, name in enumerate((b"\xff\xfe.png", b"bad\xff.mp4", "\u202e\U0001f600.png".encode())):
        Image.fromarray(movie(1)[0] + i).save(os.path.join(os.fsencode(scans), name), "png")
    cache = ingest([scans], tmp_path / "cache", size=SIZE, workers=0, progress=False)
    assert cache.ids == ["scans/\\xff\\xfe.png", "scans/\u202e\U0001f600.png"]
    command = ["embed", str(scans), "-o", str(tmp_path / "f.parquet"), "--checkpoint", str(tiny_export)]
    assert main([*command, "--name", "test_resnet"]) == 0
    assert "2 clips" in capsys.readouterr().out
    assert set(pq.read_table(tmp_path / "f.parquet")["clip"].to_pylist()) == set(cache.ids)


def test_vanished_and_forbidden(tmp_path):
    clip = Clip("x/a.png", "x", "image", (tmp_path / "a.png",))
    with pytest.raises(UnreadableClip, match="FileNotFound|No such file"):
        decode(clip)
    (tmp_path / "dangling.mp4").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.mp4")  # would block for ever
    assert find_clips([tmp_path]) == []


def video(path, sizes, codec="mpeg2video", pix_fmt="yuv420p", format=None):
    """A stream of pieces of different sizes (height, width), three frames each, one after the other."""
    content = b""
    for height, width in sizes:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=format or codec) as container:
            stream = container.add_stream(codec, rate=20)
            stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
            for grey in movie(3, height, width):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "gray")))
            container.mux(stream.encode(None))
        content += buffer.getvalue()
    path.write_bytes(content)
    return path


def zoo(root):
    """Files of every kind that users bring and attackers make, into root -> names of those that hold a picture."""
    root.mkdir()
    grey = Image.fromarray(movie(1)[0])
    # good, if odd
    Image.fromarray(movie(1)[0].astype(np.uint16) * 257).save(root / "deep.png")
    video(root / "odd.avi", [(47, 63)], "mjpeg", "yuvj420p", "avi")
    Image.fromarray(movie(1, 47, 63)[0]).convert("RGB").save(root / "odd.jpg", subsampling="4:2:0")
    for mode, name in (("RGBA", "rgba.png"), ("P", "palette.png"), ("CMYK", "cmyk.jpg"), ("1", "bits.png")):
        (grey.quantize(64) if mode == "P" else grey.convert("RGB").convert(mode)).save(root / name)
    Image.new("P", (40, 30), 1).save(root / "sizes.gif", save_all=True, append_images=[Image.new("P", (20, 10), 2)])
    video(root / "sizes.mpeg", [(48, 64), (80, 96)])
    dicom(root / "scan.dcm", movie(3))
    good = {path.name for path in root.iterdir()}
    # bad
    whole = write(root / "truncated.mp4", movie(), "mpeg4").read_bytes()
    (root / "truncated.mp4").write_bytes(whole[:-300])
    (root / "renamed.png").write_bytes(whole)
    (root / "renamed.dcm").write_bytes(whole)
    for name in ("empty.mp4", "empty.png", "empty.dcm"):
        (root / name).touch()
    with av.open(str(root / "zero.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=20)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    dicom(root / "zero.dcm", movie(1)[:0])
    Image.new("L", (1, 1)).save(root / "one.png")
    Image.new("L", (8000, 6000)).save(root / "huge.png")
    png_header(root / "bomb.png", 60000, 60000)
    video(root / "grows.mpeg", [(48, 64), (4200, 4000)])
    Image.fromarray(np.full((20, 20), np.nan, np.float32)).save(root / "nan.tif")
    (root / "pickle.png").write_bytes(pickle.dumps({"a": 1}))
    return good


def test_everything_else_is_processed(tmp_path, tiny_export, capsys):
    """Ingest and `uscl-hub embed` on the whole zoo: the good ones are there, each of the others is named."""
    good = zoo(tmp_path / "zoo")
    bad = {path.name for path in (tmp_path / "zoo").iterdir()} - good
    cache = ingest([tmp_path / "zoo"], tmp_path / "cache", size=SIZE, workers=0, progress=False)
    assert {Path(name).name for name in cache.ids} == good and len(bad) == 14
    report = json.loads((cache.path / "report.json").read_text())
    assert {Path(entry["id"]).name for entry in report["unreadable"]} == bad
    assert {Path(n["id"]).name: n["note"] for n in report["notes"]} == {
        "sizes.mpeg": "frames differ in size: resized to the first, 64 x 48"
    }

    command = ["embed", tmp_path / "zoo", "-o", tmp_path / "f.parquet", "--checkpoint", tiny_export]
    assert main([*map(str, command), "--name", "test_resnet", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert {Path(entry["path"]).name for entry in out["failed"]} == bad
    assert {(e["reason"]) for e in out["failed"]} == {e["reason"] for e in report["unreadable"]}
    assert [Path(n["clip"]).name for n in out["notes"]] == ["sizes.mpeg"]
    rows = pq.read_table(tmp_path / "f.parquet").to_pylist()
    assert {Path(row["clip"]).name for row in rows} == good

    for name in good:
        (tmp_path / "zoo" / name).unlink()
    with pytest.raises(CacheError, match="0 readable clips"):
        ingest([tmp_path / "zoo"], tmp_path / "none", size=SIZE, workers=0, progress=False)
    command[3] = tmp_path / "g.parquet"
    assert main([*map(str, command), "--name", "test_resnet"]) == 1
    message = capsys.readouterr().err
    assert "nothing could be read" in message and "Traceback" not in message
    assert not (tmp_path / "g.parquet").exists() and not list(tmp_path.glob("g*"))


def test_a_deflated_dicom_bomb(tmp_path, monkeypatch):
    dicom(tmp_path / "a.dcm", movie())
    data = pydicom.dcmread(tmp_path / "a.dcm")
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(tmp_path / "a.dcm")
    assert np.array_equal(decode(one(tmp_path / "a.dcm"))[0], movie())
    (tmp_path / "trailing.dcm").write_bytes((tmp_path / "a.dcm").read_bytes() + bytes(100_000))
    assert np.array_equal(decode(one(tmp_path / "trailing.dcm"))[0], movie())
    data.PixelData = bytes(1 << 27)
    data.save_as(tmp_path / "b.dcm")
    assert (tmp_path / "b.dcm").stat().st_size < 1 << 18
    monkeypatch.setattr(sys.modules["uscl_hub.clips.dicom"], "MAX_BYTES", 1 << 26)
    assert "inflates to more than" in reason(tmp_path / "b.dcm")


@pytest.mark.parametrize("crop", ["crop", "none"])
def test_one_preprocessing_for_training_evaluation_and_deployment(tmp_path, tiny_export, crop):
    """The same clip through ingest, through evaluation's frames and through `embed`: the same images, to the bit."""
    write_video(tmp_path / "data" / "clip.mp4", simulate_clip("lung", 9, 64, seed=3))
    trained = ingest([tmp_path / "data"], tmp_path, size=SIZE, crop=crop, workers=0, progress=False).clip(0)
    (clip,) = find_clips([tmp_path / "data"])
    item = datasets.Item("clip", clip.files[0], "video", "a", "g")
    evaluated = frames.decode_item((item, SIZE, 1e9, crop))[0]  # at this rate, every frame
    assert np.array_equal(trained, evaluated) and np.array_equal(trained, read_clip(clip, SIZE, crop=crop).images)

    model = uscl_hub.load_meta_uscl_backbone("test_resnet", checkpoint=tiny_export)
    images = torch.stack([uscl_hub.create_transform(model)(image) for image in trained])
    assert torch.equal(to_input(evaluated, backbones.load_backbone(str(tiny_export))), images)
    with torch.inference_mode():
        features = model(images.to(memory_format=torch.channels_last)).numpy()  # another layout rounds otherwise
    assert np.array_equal(probe.representations(model, trained, SIZE, torch.device("cpu")), features)
    out = tmp_path / "f.parquet"
    embed([tmp_path / "data"], out, name="test_resnet", checkpoint=tiny_export, crop=crop, progress=False)
    rows = pq.read_table(out, filters=[("level", "=", "frame")])
    np.testing.assert_allclose(rows["feature"].to_pylist(), features, rtol=1e-5, atol=1e-6)  # other threads, rounding


def test_nothing_readable_fails(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.mp4").write_bytes(b"x")
    with pytest.raises(CacheError, match=r"0 readable clips .*; data/a\.mp4: "):
        ingest([tmp_path / "data"], tmp_path / "out", size=32, workers=0, progress=False)
