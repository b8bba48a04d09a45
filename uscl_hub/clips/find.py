"""Find ultrasound clips in folders: videos, DICOM files, folders of numbered frames, single images."""

import os
import re
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np
from PIL import Image

from uscl_hub.clips.clip import Clip

VIDEO = {".mp4", ".m4v", ".mov", ".avi", ".mpeg", ".mpg", ".webm", ".mkv", ".wmv", ".gif"}
IMAGE = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".pgm", ".ppm"}
DICOM = {".dcm", ".dicom", ".ima"}


def find_clips(roots: Sequence[Path | str]) -> list[Clip]:
    """All clips below `roots` (folders, any nesting, or single files), sorted by id.

    At least two images of one folder whose names differ only in their last number are one 'frames' clip, in the
    numbers' order, unless they differ in size: then they are separate images (a few headers are looked at).
    Hidden files are left out; linked folders are followed, once. Raises FileNotFoundError for a missing root.
    """
    if isinstance(roots, (str, Path)):
        roots = [roots]
    resolved = list(dict.fromkeys(Path(root).resolve() for root in roots))
    for root in resolved:
        if not root.exists():
            raise FileNotFoundError(f"{root}: no such file or folder")
    folders = {root: root if root.is_dir() else root.parent for root in resolved}
    names = _source_names(set(folders.values()))
    clips = {}
    for root, folder in folders.items():
        source = names[folder]
        listing = _walk(root) if root.is_dir() else [(folder, [root.name])]
        for parent, files in listing:
            for clip in _clips_of_folder(parent, files, folder, source):
                clips[clip.id] = clip
    return sorted(clips.values(), key=lambda clip: clip.id)


def _source_names(folders: set[Path]) -> dict[Path, str]:
    """The folder's own name, with as many parents as are needed to tell two of the same name apart."""
    names = {}
    for folder in folders:
        for depth in range(1, len(folder.parts) + 1):
            tail = folder.parts[-depth:]
            if not any(other != folder and other.parts[-depth:] == tail for other in folders):
                break
        names[folder] = "/".join(part.strip("/\\:") or "root" for part in tail)
    return names


def _walk(root: Path) -> Iterator[tuple[Path, list[str]]]:
    seen = set()
    for parent, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder already listed, or a loop
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(parent), files


def _clips_of_folder(parent: Path, names: list[str], root: Path, source: str) -> Iterator[Clip]:
    prefix = "/".join((source, *parent.relative_to(root).parts))

    def clip(name, kind, files):
        return Clip(_printable(f"{prefix}/{name}"), _printable(source), kind, files)

    numbered = defaultdict(list)
    for name in sorted(names):
        path = parent / name
        extension = path.suffix.lower()
        if name.startswith(".") or not path.is_file():
            continue
        if extension in IMAGE:
            match = re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem, re.DOTALL)
            if match:
                numbered[match[1], match[3], extension].append((int(match[2]), name))
            else:
                yield clip(name, "image", (path,))
        elif extension in VIDEO:
            yield clip(name, "video", (path,))
        elif extension in DICOM or (not extension[1:].isalpha() and _has_dicom_magic(path)):
            yield clip(name, "dicom", (path,))
    for (before, after, extension), frames in numbered.items():
        files = tuple(parent / name for _, name in sorted(frames))
        if len(files) == 1 or _sizes_differ(files):
            for path in files:
                yield clip(path.name, "image", (path,))
        else:
            yield clip(f"{before}#{after}{extension}", "frames", files)


def _printable(name: str) -> str:
    """A file's name as text: bytes that are not UTF-8 are written out, as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _has_dicom_magic(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _sizes_differ(files: tuple[Path, ...]) -> bool:
    sizes = set()
    for i in sorted({round(x) for x in np.linspace(0, len(files) - 1, 8)}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(files[i]) as image:
                    sizes.add(image.size)
        except Exception:  # noqa: BLE001 - an unreadable frame says nothing here; decoding reports it
            continue
    return len(sizes) > 1
