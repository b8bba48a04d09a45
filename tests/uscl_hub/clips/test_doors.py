"""What is opened: formats by extension, regular files, limits on what is decoded, one memory budget, a time limit."""

import io
import os
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pydicom
import pytest
from helpers import dicom, movie, one
from PIL import Image
from pydicom.encaps import encapsulate

from uscl_hub.clips import Clip, UnreadableClip, content_hash, memory
from uscl_hub.clips.clip import PICTURE_FORMATS
from uscl_hub.clips.decode import decode
from uscl_hub.clips.read import read_clip, read_in_time
from uscl_hub.errors import UserError

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"


def reason(path):
    with pytest.raises(UnreadableClip) as caught:
        decode(one(path))
    assert "\n" not in caught.value.reason
    return caught.value.reason


@pytest.mark.parametrize("extension", sorted(PICTURE_FORMATS))
def test_only_the_formats_of_its_extension_see_a_file(tmp_path, monkeypatch, extension):
    """PostScript would start Ghostscript; an icon holds a picture of any size behind a small header."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    content, path = io.BytesIO(), tmp_path / f"a{extension}"
    Image.new("L", (300, 300)).save(content, "PNG")
    icon = struct.pack("<HHHBBBBHHII", 0, 1, 1, 32, 32, 0, 0, 1, 32, len(content.getvalue()), 22) + content.getvalue()
    for hostile in (POSTSCRIPT, icon):
        path.write_bytes(hostile)
        assert reason(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("extension", [".png", ".mp4", ".dcm", ".gif", ".tif"])
@pytest.mark.parametrize("what", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(tmp_path, extension, what):
    path = tmp_path / f"a{extension}"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    kind = {".mp4": "video", ".gif": "video", ".dcm": "dicom"}.get(extension, "image")
    started = time.monotonic()
    for act in (decode, content_hash):
        with pytest.raises(UnreadableClip, match="not a regular file"):
            act(Clip("x", "x", kind, (path,)))
    assert time.monotonic() - started < 25


def compressed(path, frame: bytes, syntax, rows=48, columns=64, **tags):
    """A DICOM file of one compressed frame."""
    dicom(path, np.zeros((1, rows, columns), np.uint8))
    data = pydicom.dcmread(path)
    data.PixelData = encapsulate([frame])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = syntax
    for key, value in tags.items():
        setattr(data, key, value)
    data.save_as(path)
    return path


@pytest.mark.parametrize("name, format", [("JPEG2000Lossless", "JPEG2000"), ("JPEGBaseline8Bit", "JPEG")])
def test_a_compressed_frame_is_as_large_as_its_own_header_says(tmp_path, name, format):
    syntax = getattr(pydicom.uid, name)
    for size, text in (((6000, 5000), "limit"), ((80, 50), "80 x 50 pixels in a file of 64 x 48")):
        buffer = io.BytesIO()
        Image.new("L", size).save(buffer, format, **({"no_jp2": True} if format == "JPEG2000" else {}))
        frame = buffer.getvalue()
        assert text in reason(compressed(tmp_path / "a.dcm", frame[: 1 << 15], syntax))


@pytest.mark.parametrize(
    "where", ["native", *(pytest.param(w, marks=pytest.mark.slow) for w in ("fragment", "offset table", "private"))]
)
def test_a_sparse_dicom_file_takes_no_memory(tmp_path, where):
    """3 GiB of holes: in the pixels, a fragment, the offset table, or an element before the pixels."""
    path, size = tmp_path / "a.dcm", 3 << 30
    if where == "native":
        dicom(path, movie(1))
        data = bytearray(path.read_bytes())
        at = data.rindex(movie(1).tobytes()) - 4
        data[at : at + 4] = struct.pack("<L", 0xFFFFFFFE - 1)
    else:
        data = compressed(path, b"\0" * 64, pydicom.uid.RLELossless).read_bytes()
        pixels = data.rindex(b"\xe0\x7f\x10\x00")
        first = data.index(b"\xfe\xff\x00\xe0", pixels)
        second = data.index(b"\xfe\xff\x00\xe0", first + 4)
        if where == "fragment":
            data = data[: second + 4] + struct.pack("<L", size - len(data))
        elif where == "offset table":
            data = data[: first + 4] + struct.pack("<L", size - len(data))
        else:
            data = data[:pixels] + b"\x11\x70\x10\x10UN\0\0\xff\xff\xff\xff"
    path.write_bytes(data)
    os.truncate(path, size)
    code = (
        "import resource, sys\nfrom uscl_hub.media import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: print(len(decode(find_clips([sys.argv[1]])[0], max_frames=3)[0]))\n"
        "except UnreadableClip as error: print(error.reason)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)"
    )
    out = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=600)
    said = out.stdout.splitlines()
    assert len(said) == 2 and int(said[1]) < 700, (out.stdout, out.stderr)


@pytest.fixture
def alone():
    """This process has the memory's budget to itself."""
    memory.divide(1)
    yield
    memory.divide(1)


def test_memory_is_half_the_machines_or_as_set_and_is_divided(monkeypatch, alone):
    monkeypatch.delenv(memory.SETTING, raising=False)
    whole = memory.budget()
    assert 2**26 <= whole <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    memory.divide(4)
    assert memory.budget() == max(2**26, whole // 4)
    monkeypatch.setenv(memory.SETTING, "1.5")
    memory.divide(2)
    assert memory.budget() == 3 * 2**28
    for wrong in ("much", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(memory.SETTING, wrong)
        with pytest.raises(UserError, match="number of GiB"):
            memory.budget()


def test_frames_are_the_same_whatever_the_memory(tmp_path, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 255, (90, 64, 80)).astype(np.uint8)
    clip = one(dicom(tmp_path / "a.dcm", frames))
    plenty = read_clip(clip, 32)
    monkeypatch.setattr(memory, "budget", lambda: 4 * 40 * 64 * 80)  # 40 frames may be held
    scarce = read_clip(clip, 32)
    assert np.array_equal(plenty.images, scarce.images) and plenty.region.box == scarce.region.box
    assert np.array_equal(plenty.before, scarce.before) and plenty.text == scarce.text
    with pytest.raises(UnreadableClip, match="decoded frames"):
        decode(clip)


def test_a_clip_may_take_so_long(tmp_path):
    clip = one(dicom(tmp_path / "a.dcm", movie(2)))
    assert read_in_time(lambda c: c.id, clip, 5) == clip.id
    with pytest.raises(KeyError, match="mine"):
        read_in_time(lambda c: {}["mine"], clip, 5)
    hang, stopped = threading.Event(), threading.Event()
    with pytest.raises(UnreadableClip, match=r"more than 0\.3 s"):
        read_in_time(lambda c: hang.wait(30), clip, 0.3)
    stopped.set()
    started = time.monotonic()
    with pytest.raises(UnreadableClip):
        read_in_time(lambda c: hang.wait(30), clip, 30, stopped)
    assert time.monotonic() - started < 25
    hang.set()
