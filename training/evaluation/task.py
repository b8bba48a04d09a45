"""A task: which files, which label, which group (patient), and what cannot be used."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from uscl_hub.clips import Clip, content_hash
from uscl_hub.errors import UserError
from uscl_hub.files import sha256


class EvaluationError(UserError):
    """Something in an evaluation's settings or data that the user can correct."""


class TaskError(EvaluationError):
    """A data set that cannot be evaluated as it is."""


@dataclass(frozen=True)
class Item:
    """One labelled file. aliases: other names under which its group may stand in a checkpoint's provenance."""

    id: str
    path: Path
    kind: str  # 'video', 'image', 'dicom' or 'frames'
    label: str
    group: str
    masks: tuple[Path, ...] = ()
    aliases: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()  # of a numbered series, whose first one is path
    values: tuple[float, ...] = ()  # of several labels (0 or 1) or of a regression

    @property
    def clip(self) -> Clip:
        return Clip(self.id, "", self.kind, self.files or (self.path,))

    @cached_property
    def sha256(self) -> str:
        """Of the content, as uscl_hub.clips.content_hash has it."""
        return content_hash(self.clip)

    @cached_property
    def file_sha256(self) -> tuple[str, ...]:
        """Of each file of a numbered series."""
        return tuple(sha256(path) for path in self.files)


@dataclass
class Task:
    """A question and the files that it is asked of.

    classes: of several labels or of a regression the names of the columns. excluded: (id, reason) of files that belong
    to the task and cannot be used. notes: what a reader must know. kind: 'classification', 'segmentation',
    'multilabel' or 'regression'. external: items whose id is in it are tested once, by what all others taught; empty:
    the task is tested in folds.
    """

    name: str
    title: str
    classes: tuple[str, ...]
    items: list[Item]
    excluded: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    kind: str = "classification"
    external: frozenset[str] = frozenset()

    @property
    def found(self) -> int:
        return len(self.items) + len(self.excluded)

    @property
    def tested(self) -> list[Item]:
        """The items but those that an external test only learns from."""
        return [item for item in self.items if not self.external or item.id in self.external]

    @property
    def labels(self) -> np.ndarray:  # int (items,), an index into classes
        return np.array([self.classes.index(item.label) for item in self.items])

    @property
    def targets(self) -> np.ndarray:
        """What is to be predicted: labels, or float32 (items, classes) for several labels and regression."""
        if self.kind in ("multilabel", "regression"):
            return np.array([item.values for item in self.items], np.float32)
        return self.labels

    @property
    def strata(self) -> np.ndarray:
        """What folds and subsets are balanced by, int (items,): labels; for regression fifths of the first column."""
        if self.kind == "regression":
            first = self.targets[:, 0]
            return np.searchsorted(np.quantile(first, (0.2, 0.4, 0.6, 0.8)), first)
        return np.zeros(len(self.items), int) if self.kind == "multilabel" else self.labels

    @property
    def groups(self) -> np.ndarray:  # str (items,)
        return np.array([item.group for item in self.items])

    @property
    def has_video(self) -> bool:
        """Whether some items may have several frames."""
        return any(item.kind != "image" for item in self.items)


def check_excluded(task: Task, max_excluded: float):
    if not task.items or len(task.excluded) > max_excluded * task.found:
        listing = "; ".join(f"{name}: {reason}" for name, reason in task.excluded[:3])
        raise TaskError(
            f"{task.title}: {len(task.excluded)} of {task.found} files cannot be used, more than "
            f"--max-excluded {max_excluded:g} allows; repair them or raise it. The first: {listing}"
        )
    tested = {item.group for item in task.tested}
    if len(tested) < 2:
        raise TaskError(f"{task.title}: its test has files of {len(tested)} group(s); an interval needs two groups")
