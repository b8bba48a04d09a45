"""Find ultrasound clips in folders: videos, DICOM files, folders of numbered frames, single images."""

import os
import re
import stat
import struct
import unicodedata
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Iterator, Sequence

import numpy as np

from uscl_hub.clips.alike import ALIKE, headers, likeness
from uscl_hub.clips.clip import Clip, extension_of, kind_of
from uscl_hub.files import existing, open_regular

FRAMES = ("auto", "clip", "images")
UNKNOWN = "not a known image, video or DICOM file"
OF_A_MASK = re.compile(r"(.+)_mask(_\d+)?", re.DOTALL)
MASK_FOLDERS = ("masks", "mask")  # beside a folder `images`


@dataclass
class Report:
    """What `find_clips` passed over, and what it took numbered files for."""

    passed_over: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))  # reason: names
    as_clip: list[str] = field(default_factory=list)
    as_images: list[str] = field(default_factory=list)

    def lines(self, few: int = 3) -> list[str]:
        """Sentences for the terminal: a count and the first names each."""

        def some(names):
            return ", ".join(map(ascii_line, names[:few])) + (", ..." if len(names) > few else "")

        said = [f"{len(n)} passed over, {reason}: {some(n)}" for reason, n in sorted(self.passed_over.items())]
        decided = [
            f"{len(names)} taken as {what}: {some(names)}"
            for names, what in ((self.as_clip, "one clip each"), (self.as_images, "separate images"))
            if names
        ]
        if self.as_images:  # the usual case, a clip, needs no word
            said.append("folders of numbered files, " + "; ".join(decided) + " (frames auto decides by likeness)")
        return said

    def as_dict(self) -> dict:
        """For a report in JSON."""
        return {
            "passed_over": {reason: sorted(names) for reason, names in sorted(self.passed_over.items())},
            "numbered_files": {"one clip": self.as_clip, "separate images": self.as_images},
        }


def ascii_line(name: str) -> str:
    """A file's name on one line, its control characters written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def find_clips(
    roots: Sequence[Path | str] | Path | str, frames: str = "auto", report: Report | None = None
) -> list[Clip]:
    """All clips below `roots` (folders, any nesting, or single files), sorted by id. No two have the same id, and no
    file is in two of them.

    frames: what images of one folder are whose names differ only in their last number. 'clip': one clip, in the
    numbers' order; 'images': separate images; 'auto': one clip if neighbours look alike (a few thumbnails are looked
    at, see `alike`). Files of different sizes or of several pages are separate with 'auto'.
    report: filled with what is passed over, and with what was decided.
    A folder that cannot be listed is a clip of kind 'closed', which cannot be decoded. Hidden files are left out, and
    masks in the layouts of `uscl_hub.labels` are passed over; linked folders are followed, once. Raises
    FileNotFoundError for a missing root, ValueError for unknown `frames`.

    >>> clips = find_clips(["scans"], report=(report := Report()))  # doctest: +SKIP
    >>> print(*report.lines(), sep="\\n")  # doctest: +SKIP
    """
    if frames not in FRAMES:
        raise ValueError(f"frames {frames!r} is not 'auto', 'clip' or 'images'")
    report = Report() if report is None else report
    if isinstance(roots, (str, Path)):
        roots = [roots]
    named = list(dict.fromkeys(_named(Path(root)) for root in roots))
    folders = {root: root if root.is_dir() else root.parent for root in named}
    names = _source_names(set(folders.values()))
    seen: set[str] = set()
    known: set[tuple[str, str]] = set()
    clips: list[Clip] = []
    # outer folders first, single files last: what is given twice is found once
    for root in sorted(named, key=lambda root: (not root.is_dir(), len(os.path.realpath(root)), str(root))):
        folder = folders[root]
        listing = walk(root, seen) if root.is_dir() else [(folder, [root.name])]
        for parent, files in listing:
            here = os.path.realpath(parent)
            for clip in _clips_of_folder(parent, files, folder, names[folder], frames, report):
                keys = {(here, file.name) for file in clip.files}
                if root.is_dir() or not keys <= known:
                    clips.append(clip)
                known |= keys
    return _unique(clips)


def _named(root: Path) -> Path:
    """An absolute path that keeps the name that was given: a link's own, not its target's. Raises FileNotFoundError."""
    if (found := existing(root)) is None:
        raise FileNotFoundError(f"{root.absolute()}: no such file or folder")
    if found.name in ("", ".."):
        return found.resolve()
    return found.parent.resolve() / found.name


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


def walk(root: Path, seen: set[str]) -> Iterator[tuple[Path, list[str] | None]]:
    """Folders and the files in them, None for a folder that cannot be listed. seen: real paths of what was listed."""
    closed = []
    for parent, folders, files in os.walk(root, followlinks=True, onerror=lambda error: closed.append(error.filename)):
        real = os.path.realpath(parent)
        if real in seen:  # a link to a folder already listed, a loop, or a root within another
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield Path(parent), files
    for folder in closed:
        if os.path.realpath(folder) not in seen:
            seen.add(os.path.realpath(folder))
            yield Path(folder), None


def _clips_of_folder(
    parent: Path, names: list[str] | None, root: Path, source: str, frames: str, report: Report
) -> Iterator[Clip]:
    prefix = "/".join((source, *parent.relative_to(root).parts))

    def clip(name, kind, files):
        return Clip(clean_name(f"{prefix}/{name}"), clean_name(source), kind, files, root)

    if names is None:
        yield Clip(clean_name(prefix), clean_name(source), "closed", (parent,), root)
        return
    numbered = defaultdict(list)
    masks = _masks(parent, root, names)
    for name in sorted(names):
        if name.startswith("."):
            continue
        path = parent / name
        if name in masks:
            report.passed_over["masks of other pictures"].append(clean_name(f"{prefix}/{name}"))
            continue
        kind, extension = _kind(path, report, f"{prefix}/{name}")
        match = re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem, re.DOTALL) if kind == "image" else None
        if match:
            numbered[match[1], match[3], path.suffix.lower(), extension].append((int(match[2]), name))
        elif kind:
            yield clip(name, kind, (path,))
    for (before, after, suffix, _), found in numbered.items():
        files = tuple(parent / name for _, name in sorted(found))
        name = f"{before}#{after}{suffix}"
        if len(files) > 1 and _one_clip(files, frames, report, clean_name(f"{prefix}/{name}")):
            yield clip(name, "frames", files)
        else:
            for path in files:
                yield clip(path.name, "image", (path,))


def _masks(parent: Path, root: Path, names: list[str]) -> set[str]:
    """Those of a folder's pictures that outline something in others: x_mask.png beside x.png; masks/x.png beside
    images/, unless it is what was asked for."""

    def pictures(candidates):
        return {name for name in candidates if kind_of(extension_of(parent / name)) == "image"}

    parts = parent.relative_to(root).parts
    if any(part in MASK_FOLDERS and root.joinpath(*parts[:i], "images").is_dir() for i, part in enumerate(parts)):
        return pictures(names)
    stems = {name: os.path.splitext(name)[0] for name in names}
    masked = {name: match[1] for name, stem in stems.items() if (match := OF_A_MASK.fullmatch(stem))}
    if not masked:  # as nearly everywhere: nothing more is asked of the files
        return set()
    shown = {stems[name] for name in pictures(names)}
    return {name for name in pictures(masked) if masked[name] in shown}


def _kind(path: Path, report: Report, name: str) -> tuple[str | None, str]:
    """'image', 'video', 'dicom', or None for what is passed over, which is reported; the extension that says so."""
    extension = extension_of(path)
    by_name = kind_of(extension)
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            reason = "links to nothing"
        elif by_name:  # it is there, but cannot be reached: decoding says why
            return by_name, extension
        else:
            reason = f"cannot be looked at ({error.strerror})"
        report.passed_over[reason].append(clean_name(name))
        return None, extension
    if stat.S_ISREG(mode):
        kind = by_name or ("dicom" if _looks_like_dicom(path) else None)
        reason = UNKNOWN
    else:
        kind, reason = None, "not a regular file"
    if kind is None:
        report.passed_over[reason].append(clean_name(name))
    return kind, extension


def _one_clip(files: tuple[Path, ...], frames: str, report: Report, name: str) -> bool:
    """Whether numbered files are the frames of one clip."""
    if frames != "auto":
        return frames == "clip"
    picked = [files[i] for i in sorted({round(x) for x in np.linspace(0, len(files) - 1, 8)})]
    sizes, pages = headers(picked)
    alike = len(sizes) < 2 and pages < 2 and likeness(files) >= ALIKE
    (report.as_clip if alike else report.as_images).append(name)
    return alike


def _unique(clips: list[Clip]) -> list[Clip]:
    """Sorted by id, and every id once: of two that would get the same one, the file that is called so keeps it, the
    others are told apart by ~2, ~3 and so on."""
    taken, result = {clip.id for clip in clips}, {}
    for clip in sorted(clips, key=lambda clip: (clip.id, clip.kind == "frames", *map(os.fsencode, clip.files))):
        name, number = clip.id, 2
        while name in result or (number > 2 and name in taken):
            name, number = f"{clip.id}~{number}", number + 1
        result[name] = replace(clip, id=name) if name != clip.id else clip
    return [result[name] for name in sorted(result)]


def clean_name(name: str) -> str:
    """A file's name as text, in one spelling (Unicode's NFC)."""
    return unicodedata.normalize("NFC", as_text(name))


def as_text(name: str | Path) -> str:
    """A file's name as it is, but for bytes that are not UTF-8, which are written out, as \\xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _looks_like_dicom(path: Path) -> bool:
    """DICOM by its first bytes, with the preamble or, in old archives, without."""
    try:
        with open_regular(path) as file:
            head = file.read(132)
    except OSError:
        return False
    if head[128:] == b"DICM":
        return True
    if len(head) < 132:
        return False
    group, element, vr, length = struct.unpack("<HH2sH", head[:8])
    if group not in (2, 8) or element > 0x20:
        return False
    return vr in (b"UL", b"UI", b"CS", b"SH", b"DA") and length <= 64 or vr[1:] == b"\0" and vr[0] <= 64 and not length
