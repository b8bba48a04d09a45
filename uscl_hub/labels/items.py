"""The list of labelled files, and what is said about each."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from uscl_hub.clips import Clip, content_hash
from uscl_hub.errors import UserError
from uscl_hub.files import sha256

TASKS = ("classification", "regression", "multilabel", "segmentation")


class LabelError(UserError):
    """Labels that nothing can be trained on: the message names the file or column and says what to do."""


@dataclass(frozen=True)
class Item:
    """One labelled file (or folder of numbered frames). id: posix path relative to the folder or the table.
    label: as written; of several columns joined by blanks. group: what must not be split, '' if unknown.
    split: '' if none is given. masks: files of its lesions, to be merged."""

    id: str
    clip: Clip
    label: str = ""
    group: str = ""
    split: str = ""
    masks: tuple[Path, ...] = ()

    @property
    def path(self) -> Path:
        return self.clip.files[0].parent if self.clip.kind == "frames" else self.clip.files[0]

    @property
    def kind(self) -> str:
        """'image', 'video', 'dicom' or 'frames'."""
        return self.clip.kind


@dataclass(frozen=True)
class Labels:
    """The labelled files of a folder or table.

    task: one of TASKS. classes: the classes; for several labels and for regression the columns' names; for segmentation
    ('foreground',). targets: int64 (N,), the class, or 0 for segmentation; float32 (N, len(classes)) for
    multilabel (0 or 1) and regression. groups_known: False where no groups are given. notes: what a person should
    know, a line each.
    """

    source: Path
    task: str
    classes: tuple[str, ...]
    items: tuple[Item, ...]
    targets: np.ndarray
    groups_known: bool
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> np.ndarray:
        """str (N,). Where no groups are given every file is its own; see `cluster`."""
        return np.array([item.group or item.id for item in self.items])

    @property
    def splits(self) -> np.ndarray:
        """str (N,), '' where none is given."""
        return np.array([item.split for item in self.items])

    def subset(self, index) -> "Labels":
        """The items of an int or bool index (M,), in that order; classes stay."""
        chosen = np.arange(len(self.items))[index]
        return replace(self, items=tuple(self.items[i] for i in chosen), targets=self.targets[chosen])

    def sha(self) -> str:
        """Hex SHA-256 of the files' content, the targets, the groups and the masks; not of where they lie."""
        digest = hashlib.sha256(f"{self.task}{self.classes}".encode())
        for item, target, group in zip(self.items, self.targets, self.groups):
            digest.update((content_hash(item.clip) + "".join(map(sha256, item.masks))).encode())
            digest.update(np.asarray(target).tobytes() + str(group).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()
