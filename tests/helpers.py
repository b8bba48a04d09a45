"""What several tests share: where things are, running commands, makers of small media files."""

import os
from itertools import chain, repeat
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np

from training.data import index
from training.data.cache import FrameCache
from uscl_hub.clips import find_clips

ROOT = Path(__file__).parents[1]  # the checkout
DATA = Path(os.environ.get("USCL_DATA", ROOT.parent / "shared" / "data"))  # real clips; may be absent


def interrupted(function, call):
    """A mock of `function` that is Ctrl-C at one of its calls (the first is 1)."""
    return Mock(wraps=function, side_effect=chain(repeat(DEFAULT, call - 1), [KeyboardInterrupt], repeat(DEFAULT)))


def movie(t=6, h=48, w=64):
    """A bright square that moves over a ramp: easy on lossy codecs."""
    frames = np.repeat((np.arange(w) * 2 + 40).astype(np.uint8)[None, None].repeat(h, 1), t, 0)
    for i in range(t):
        frames[i, 8:24, 4 + 6 * i : 16 + 6 * i] = 220
    return frames


def write(path, frames, codec, fps=20, pix_fmt="yuv420p", **options):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], pix_fmt
        for grey in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "gray")))
        container.mux(stream.encode(None))
    return path


def one(path):
    (clip,) = find_clips([path])
    return clip


def dicom(path, pixels, photometric="MONOCHROME2", bits=None, compress=None, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, UltrasoundMultiFrameImageStorage, generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = UltrasoundMultiFrameImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = generate_uid()
    data.PatientName, data.PatientID = "PLANTED^NAME", "PLANTED-ID"
    colour = pixels.ndim == 4
    data.NumberOfFrames, data.Rows, data.Columns = pixels.shape[:3]
    data.SamplesPerPixel, data.PhotometricInterpretation = 3 if colour else 1, photometric
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = pixels.dtype.itemsize * 8
    data.BitsStored = bits or data.BitsAllocated
    data.HighBit, data.PixelRepresentation = data.BitsStored - 1, int(pixels.dtype.kind == "i")
    for key, value in tags.items():
        setattr(data, key, value)
    data.PixelData = pixels.tobytes()
    if compress:
        data.compress(compress)
    data.save_as(path, enforce_file_format=True)
    return path


def cache_in_memory(lengths, px=8, seed=0, sources=1):
    """A FrameCache of random frames that has no folder: clips of these lengths, of the sources in turn."""
    lengths = np.array(lengths)
    offsets = (np.cumsum(lengths) - lengths).tolist()
    records = [
        {"id": f"{i:09d}", "source": f"s{i % sources}", "sha256": f"{i:064x}", "frames": n, "offset": offset}
        for i, (n, offset) in enumerate(zip(lengths.tolist(), offsets))
    ]
    cache = FrameCache(["."], px, index.columns(records))
    cache.maps = [np.random.default_rng(seed).integers(0, 256, (lengths.sum(), px, px), dtype=np.uint8)]
    return cache
