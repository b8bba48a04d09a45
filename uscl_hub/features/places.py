"""Folders of one name at several places in one feature table."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Callable

from uscl_hub.clips.clip import Clip, UnreadableClip


def tell_apart(
    clips: list[Clip], places: dict[str, str], done: dict[str, str], digest: Callable[[Clip], str]
) -> tuple[list[Clip], dict[str, str]]:
    """The clips, and the place of each of their sources; a source that the table has of another place, with other
    content under the same ids, gets its parent folder's name in front.

    places: source -> place, as the table has them. done: clip id -> content hash, as the table has them.
    A folder that has moved keeps its name: its clips' contents are the same.
    """
    renamed, result = {}, []
    for clip in clips:
        place, key = _place(clip), (clip.source, clip.root)
        if key not in renamed:
            renamed[key] = clip.source
            mine = [other for other in clips if (other.source, other.root) == key]
            if places.get(clip.source, place) != place and _differs(mine, done, digest):
                renamed[key] = _longer(clip, place, places)
        source = renamed[key]
        if source != clip.source:
            clip = replace(clip, id=source + clip.id[len(clip.source) :], source=source)
        result.append(clip)
    return result, {**places, **{clip.source: _place(clip) for clip in result}}


def _root(clip: Clip) -> Path:
    return clip.root or clip.files[0].parent


def _place(clip: Clip) -> str:
    """Where the root lies, so that it can be compared but not read."""
    return hashlib.sha256(os.fsencode(os.path.realpath(_root(clip)))).hexdigest()[:16]


def _differs(clips: list[Clip], done: dict[str, str], digest) -> bool:
    for clip in clips:
        try:
            if clip.id in done and digest(clip) != done[clip.id]:
                return True
        except (UnreadableClip, OSError):  # reading reports it
            continue
    return False


def _longer(clip: Clip, place: str, places: dict[str, str]) -> str:
    from uscl_hub.clips.find import clean_name

    parts = [part.strip("/\\:") or "root" for part in _root(clip).parts]
    names = (clean_name("/".join(parts[-depth:])) for depth in range(clip.source.count("/") + 2, len(parts) + 1))
    name = next((name for name in names if places.get(name, place) == place), None)
    number = 2
    while name is None:
        other, number = f"{clip.source}~{number}", number + 1
        name = other if places.get(other, place) == place else None
    return name
