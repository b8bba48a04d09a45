"""Mutated files through ingest and checkpoint loading: refused with a reason, or taken and right. Nothing else.

USCL_FUZZ is the number of mutated clips and of mutated checkpoints, each (docs/trust.md has the figures of 10,000):

    USCL_FUZZ=10000 pytest tests/test_fuzz.py
"""

import json
import os
import random
import shutil

import numpy as np
import pytest
import timm
import torch
from helpers import dicom, movie, write
from PIL import Image

import uscl_hub
from training.data.cache import FrameCache
from training.data.ingest import ingest
from uscl_hub import checkpoints, models
from uscl_hub.checkpoints import CheckpointError
from uscl_hub.clips import find_clips
from uscl_hub.convert import read_pth

COUNT = int(os.environ.get("USCL_FUZZ", 60))
BATCH = 500  # files a folder
SIZE = 32
NAME = "meta_uscl_resnet18"


def mutate(content: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Change bytes anywhere or near the beginning, write huge numbers, cut, repeat, insert, or splice two files."""
    data, kind = bytearray(content), rng.choice(["bytes", "head", "huge", "cut", "repeat", "insert", "splice"])
    if kind in ("bytes", "head"):
        reach = len(data) if kind == "bytes" else min(len(data), 600)
        for _ in range(rng.randint(1, 12)):
            data[rng.randrange(reach)] = rng.choice([0, 255, 127, rng.randrange(256)])
    elif kind == "huge":
        at = rng.randrange(len(data))
        data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", bytes(4)])
    elif kind == "cut":
        del data[rng.randrange(len(data)) :]
    elif kind == "repeat":
        i, j = sorted(rng.choices(range(len(data)), k=2))
        data[i:i] = data[i:j]
    elif kind == "insert":
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randint(1, 64))
    else:
        other = rng.choice(others)
        data[rng.randrange(len(data)) :] = other[rng.randrange(len(other)) :]
    return bytes(data)


# ----------------------------------------------------------------------------------------------------- clips


@pytest.fixture(scope="module")
def seeds(tmp_path_factory) -> dict[str, bytes]:
    """One small file of every kind that ingest reads."""
    import av
    import pydicom

    folder = tmp_path_factory.mktemp("seeds")
    frames = movie(4)
    for name, codec, pix_fmt in (
        ("mpeg4.mp4", "mpeg4", "yuv420p"),
        ("h264.mp4", "libx264", "yuv420p"),
        ("mpeg4.avi", "mpeg4", "yuv420p"),
        ("mjpeg.avi", "mjpeg", "yuvj420p"),
        ("mpeg4.mov", "mpeg4", "yuv420p"),
        ("mpeg2.mpeg", "mpeg2video", "yuv420p"),
        ("vp8.webm", "libvpx", "yuv420p"),
        ("ffv1.mkv", "ffv1", "gray"),
    ):
        if codec in av.codecs_available:
            write(folder / name, frames, codec, pix_fmt=pix_fmt)
    pictures = [Image.fromarray(f) for f in frames]
    pictures[0].save(folder / "a.gif", save_all=True, append_images=pictures[1:])
    for name in ("a.png", "a.jpg", "a.tif", "a.webp", "a.bmp", "a.jp2", "a.pgm"):
        pictures[0].save(folder / name)
    Image.fromarray(frames[0].astype(np.uint16) * 257).save(folder / "deep.png")
    pictures[0].save(folder / "lzw.tif", compression="tiff_lzw")
    dicom(folder / "raw.dcm", frames)
    dicom(folder / "rle.dcm", frames, compress=pydicom.uid.RLELossless)
    dicom(folder / "j2k.dcm", frames, compress=pydicom.uid.JPEG2000Lossless)
    data = pydicom.dcmread(folder / "raw.dcm")
    data.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    data.save_as(folder / "deflated.dcm")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_clips(seeds, tmp_path):
    rng, taken, refused = random.Random(0), 0, 0
    contents, names = list(seeds.values()), list(seeds)
    for first in range(0, COUNT, BATCH):
        folder = tmp_path / f"clips{first}"
        folder.mkdir()
        for i in range(first, min(first + BATCH, COUNT)):
            name = rng.choice(names)
            code = "".join("abcdefghij"[int(digit)] for digit in str(i))  # numbers would make clips of images
            (folder / f"{code}-{name}").write_bytes(mutate(seeds[name], rng, contents))
        found = {clip.id for clip in find_clips([folder])}
        assert len(found) == min(first + BATCH, COUNT) - first
        out = tmp_path / "cache"
        cache = ingest([folder], out, size=SIZE, workers=2, progress=False, min_clips=0)
        report = json.loads((cache.path / "report.json").read_text())
        unreadable = {entry["id"]: entry["reason"] for entry in report["unreadable"]}
        copies = {entry["id"] for entry in report["duplicates"]}
        assert {*cache.ids, *unreadable, *copies} == found  # every file is accounted for
        for name, reason in unreadable.items():
            assert reason and "\n" not in reason and "crashed" not in reason, (name, reason)
        for i, name in enumerate(cache.ids):
            clip = cache.clip(i)
            assert clip.dtype == np.uint8 and clip.shape[1:] == (SIZE, SIZE) and 1 <= len(clip) <= 100, name
            if name.endswith(".png"):  # the format carries checksums: right, or refused
                assert same_pixels(clip, reference(seeds, name.split("-")[1], tmp_path)), name
        assert {p.name for p in cache.path.iterdir()} == {
            *(
                "settings.json",
                "frames.u8",
                "index.jsonl",
                "index.arrow",
                "index.json",
                "report.json",
                "unreadable.json",
                ".lock",
            )
        }
        again = ingest([folder], tmp_path / "again", size=SIZE, workers=0, progress=False, min_clips=0)
        assert again.ids == cache.ids and again.frames.tobytes() == cache.frames.tobytes()  # no stray memory in it
        taken, refused = taken + len(cache) + len(copies), refused + len(unreadable)
        for used in (folder, out, tmp_path / "again"):
            shutil.rmtree(used)
    print(f"{COUNT} mutated clips: {refused} refused, {taken} taken")
    assert refused > COUNT // 4 and taken > COUNT // 10


def reference(seeds, name, tmp_path) -> np.ndarray:
    """uint8 (T, SIZE, SIZE): the frames of an unharmed file."""
    folder = tmp_path / "reference" / name
    if not folder.exists():
        folder.mkdir(parents=True)
        (folder / name).write_bytes(seeds[name])
        ingest([folder / name], folder, size=SIZE, workers=0, progress=False)
    return FrameCache.open(folder).clip(0)


def same_pixels(clip, wanted) -> bool:
    return len(clip) <= len(wanted) and np.array_equal(clip, wanted[: len(clip)])


# ----------------------------------------------------------------------------------------------- checkpoints


def equal(found, state) -> bool:
    return found.keys() == state.keys() and all(torch.equal(found[k], v) for k, v in state.items())


def test_checkpoints(tmp_path):
    """An exported folder with and without its weights' hash, its config.json, a lone file of one of our own models, and
    the authors' .pth format. In what knows no hash only the header is changed: other weights are just other weights."""
    torch.manual_seed(0)
    small, big = (timm.create_model(n, num_classes=0).state_dict() for n in ("test_resnet", "meta_uscl_resnet18"))
    cfg = models.make_cfg(64, first_conv="conv1.0")
    config = {"architecture": "test_resnet", "num_classes": 0, "num_features": 1, "pretrained_cfg": cfg}
    folder = checkpoints.save_folder(tmp_path / "folder", small, config, "# card\n")
    config = {**config, "uscl_hub": {"sha256": checkpoints.sha256(folder / "model.safetensors")}}
    hashed = checkpoints.save_folder(tmp_path / "hashed", small, config, "# card\n")
    checkpoints.save_tensors(big, tmp_path / "lone.safetensors")
    torch.save({"state_dict": small}, tmp_path / "official.pth")

    def load(checkpoint, name="test_resnet"):
        return uscl_hub.load_meta_uscl_backbone(name, checkpoint=checkpoint).state_dict()

    targets = {  # name: how often, the file, is only its header changed, how it is loaded, what it must give
        "header": (6, folder / "model.safetensors", True, lambda: load(folder), small),
        "weights": (4, hashed / "model.safetensors", False, lambda: load(hashed), small),
        "config": (4, folder / "config.json", False, lambda: load(folder), small),
        "lone": (1, tmp_path / "lone.safetensors", True, lambda: load(tmp_path / "lone.safetensors", NAME), big),
        "pth": (4, tmp_path / "official.pth", False, lambda: read_pth(tmp_path / "official.pth"), small),
    }
    kinds = [kind for kind, (often, *_) in targets.items() for _ in range(often)]
    originals = {kind: target[1].read_bytes() for kind, target in targets.items()}
    rng, taken, refused = random.Random(1), 0, 0
    for i in range(COUNT):
        kind = kinds[i % len(kinds)]
        _, path, header_only, loaded, state = targets[kind]
        content = originals[kind]
        end = 8 + int.from_bytes(content[:8], "little") if header_only else len(content)
        path.write_bytes(mutate(content[:end], rng, list(originals.values())) + content[end:])
        try:
            found = loaded()
        except CheckpointError as error:
            assert path.name in str(error) or str(path.parent) in str(error), (i, error)
            refused += 1
        else:
            assert equal(found, state), (i, kind)
            taken += 1
        path.write_bytes(content)
    print(f"{COUNT} mutated checkpoints: {refused} refused, {taken} taken, all of these equal to the original")
    assert refused > COUNT // 2
