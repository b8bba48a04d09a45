"""A labelled folder or table as a torch Dataset."""

import warnings
from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from uscl_hub.clips import UnreadableClip, iter_frames
from uscl_hub.clips.clip import extension_of
from uscl_hub.clips.crop import SAMPLES, Region, apply_region, detect_region, sample
from uscl_hub.clips.image import SEVERAL, has_frames, open_image
from uscl_hub.files import open_regular
from uscl_hub.labels import Item, LabelError, Labels, cluster, read_labels
from uscl_hub.labels.checks import IMAGE_FORMATS, is_close
from uscl_hub.preprocess import resize

KEEP_BYTES = 256 * 2**20  # decoded frames of one clip held at once
CACHE_BYTES = 512 * 2**20  # frames of videos that are kept for the next epoch, in each process


class UltrasoundDataset(Dataset):
    """Images and frames of videos with their labels, read, cropped and greyed as in pretraining.

    An image or a frame is one sample `(x, target)`: x is what `transform` makes of a uint8 (H, W) array; target is an
    int for classification, float32 (len(classes),) for multilabel and regression, and for segmentation
    a bool (h, w) tensor of the size of x, True inside of a lesion.

    Args:
        data: a folder or a table, see `uscl_hub.labels.read_labels`, or its result.
        transform: a callable on a uint8 (H, W) array, such as `uscl_hub.create_transform(model)`. Default: float32
            (1, 224, 224) in [0, 1].
        joint: instead of `transform`, for segmentation: a callable on (uint8 (H, W), bool (H, W)) that returns x and
            the mask, where both must be moved alike.
        task, columns, frames: see `read_labels`.
        split: only the files of this split of the table.
        crop: 'crop' removes the scanner's user interface, 'blank' blackens it, 'none' leaves it.
        frames_per_clip: frames taken of a video, an animation or a file of several pages, evenly spread.

    Attributes:
        task: 'classification', 'regression', 'multilabel' or 'segmentation'.
        classes: names of the classes, or of the columns.
        targets: of all samples: int64 (N,), or float32 (N, len(classes)).
        groups: of all samples, str (N,): patients, or, where they are unknown, clusters of near-duplicates; those are
            computed when first asked for.
        labels: the `Labels` of the files; `item[i]` is the file of sample i.

    Raises:
        LabelError (a UserError): the labels are broken, in one line. What a person should know is a warning.

    >>> from torch.utils.data import DataLoader
    >>> import numpy, pathlib, tempfile
    >>> from PIL import Image
    >>> root = pathlib.Path(tempfile.mkdtemp())
    >>> for name in ("benign", "malignant"):
    ...     (root / name).mkdir()
    ...     for i in range(6):
    ...         pixels = numpy.random.default_rng(i + 6 * (name == "benign")).integers(0, 255, (60, 80), numpy.uint8)
    ...         Image.fromarray(pixels).save(root / name / f"{i}.png")
    >>> data = UltrasoundDataset(root)
    >>> data.task, data.classes, len(data), data.targets.tolist()
    ('classification', ('benign', 'malignant'), 12, [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    >>> x, y = next(iter(DataLoader(data, batch_size=4)))
    >>> x.shape, y.tolist()
    (torch.Size([4, 1, 224, 224]), [0, 0, 0, 0])
    """

    def __init__(
        self,
        data,
        transform: Callable | None = None,
        *,
        joint: Callable | None = None,
        task: str | None = None,
        columns: tuple[str, ...] = (),
        split: str | None = None,
        crop: str = "crop",
        frames: str = "images",
        frames_per_clip: int = 4,
    ):  # 9 arguments: all but the first have a default, and a user names those that differ
        if crop not in ("crop", "blank", "none"):
            raise ValueError(f"crop {crop!r} is not 'crop', 'blank' or 'none'")
        if frames_per_clip < 1:
            raise ValueError(f"frames_per_clip must be at least 1, got {frames_per_clip}")
        labels = data if isinstance(data, Labels) else read_labels(data, task, columns=columns, frames=frames)
        if split is not None:
            labels = _of_split(labels, split)
        if joint is not None and (transform is not None or labels.task != "segmentation"):
            raise ValueError("joint is for segmentation, and instead of transform")
        for note in labels.notes:
            warnings.warn(f"{labels.source}: {note}", stacklevel=2)
        self.labels, self.transform, self.joint, self.crop = labels, transform or _plain, joint, crop
        self.task, self.classes = labels.task, labels.classes
        still = self.task == "segmentation"  # masks are those of single images
        counts = [1 if still or _is_still(item) else frames_per_clip for item in labels.items]
        self.item = np.repeat(np.arange(len(counts)), counts)
        self._frame = np.concatenate([np.arange(count) for count in counts])  # which of the file's frames
        self.frames_per_clip = frames_per_clip
        self._kept: dict[int, list[np.ndarray]] = {}

    @property
    def targets(self) -> np.ndarray:
        return self.labels.targets[self.item]

    @cached_property
    def groups(self) -> np.ndarray:
        labels = cluster(self.labels)
        for note in labels.notes[len(self.labels.notes) :]:
            warnings.warn(f"{labels.source}: {note}", stacklevel=3)
        return labels.groups[self.item]

    def __len__(self) -> int:
        return len(self.item)

    def __getitem__(self, index: int):
        index = range(len(self))[index]  # negative ones too, and IndexError beyond the end
        number = int(self.item[index])
        item, target = self.labels.items[number], self.labels.targets[number]
        if self.task == "segmentation":
            frame, region = self._read(item)
            mask = apply_region(read_mask(item, frame[0].shape), region, self.crop)
            return self._with_mask(apply_region(frame[0], region, self.crop), mask)
        x = self.transform(self._frames(number)[self._frame[index]])
        return x, int(target) if self.task == "classification" else torch.tensor(target)

    def _frames(self, number: int) -> list[np.ndarray]:
        if number in self._kept:
            return self._kept[number]
        item = self.labels.items[number]
        decoded, region = self._read(item)
        count = int((self.item == number).sum())
        taken = [decoded[int((k + 0.5) / count * len(decoded))] for k in range(count)]
        frames = [np.ascontiguousarray(apply_region(frame, region, self.crop)) for frame in taken]
        if item.kind != "image" and sum(f.nbytes for kept in self._kept.values() for f in kept) < CACHE_BYTES:
            self._kept[number] = frames
        return frames

    def _read(self, item: Item) -> tuple[list[np.ndarray], Region]:
        """Frames, uint8 (H, W), thinned evenly where there are too many to hold; and the region of the image."""
        held: list[np.ndarray] = []
        step = 1
        try:
            for i, (frame, _) in enumerate(iter_frames(item.clip, notes=[])):
                if i % step == 0:
                    held.append(frame)
                    if len(held) * frame.nbytes > KEEP_BYTES and len(held) > max(SAMPLES, self.frames_per_clip):
                        held, step = held[::2], 2 * step
        except UnreadableClip as error:
            raise LabelError(f"{error}. Repair it or leave it out") from error
        looked_at = sample(held)
        whole = Region(0, looked_at.shape[1], 0, looked_at.shape[2])
        return held, whole if self.crop == "none" else detect_region(looked_at)

    def _with_mask(self, image: np.ndarray, mask: np.ndarray):
        image, mask = np.ascontiguousarray(image), np.ascontiguousarray(mask)
        if self.joint is not None:
            return self.joint(image, mask)
        x = self.transform(image)
        small = Image.fromarray(mask).resize(tuple(x.shape[-2:])[::-1], Image.Resampling.NEAREST)
        return x, torch.from_numpy(np.array(small))


def _is_still(item: Item) -> bool:
    """Whether a file holds one frame, by its name or, where that leaves it open, its header."""
    if item.kind not in ("image", "dicom"):
        return False
    if item.kind == "image" and extension_of(item.path) not in SEVERAL:
        return True
    try:
        if item.kind == "image":
            with open_image(item.path) as image:
                return not has_frames(image)
        from pydicom import dcmread

        header = dcmread(item.path, stop_before_pixels=True, specific_tags=["NumberOfFrames"])
        return int(header.get("NumberOfFrames") or 1) <= 1
    except Exception:  # noqa: BLE001 - reading its frames will say what is wrong
        return False


def _plain(grey: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(resize(grey, 224))[None].float() / 255


def _of_split(labels: Labels, split: str) -> Labels:
    chosen = labels.splits == split
    if not chosen.any():
        known = ", ".join(sorted(set(labels.splits) - {""})) or "none"
        raise LabelError(f"{labels.source}: no file is in the split {split!r}; its splits: {known}")
    return labels.subset(chosen)


def read_mask(item: Item, shape: tuple[int, int]) -> np.ndarray:
    """The masks of an image, merged: bool (H, W). Raises LabelError if one cannot be read or is of another shape."""
    merged = np.zeros(shape, bool)
    for path in item.masks:
        try:
            with open_regular(path) as file, Image.open(file, formats=IMAGE_FORMATS) as image:
                grey = image.convert("L")
        except Exception as error:  # noqa: BLE001 - Pillow's parsers raise nearly anything
            raise LabelError(f"{path}: is not a mask that can be read ({type(error).__name__})") from error
        if not is_close(grey.size[::-1], shape):
            raise LabelError(
                f"{path}: has {grey.size[0]} x {grey.size[1]} pixels, its image {shape[1]} x {shape[0]}. "
                "Make them equal"
            )
        mask = np.array(grey.resize(shape[::-1], Image.Resampling.NEAREST) if grey.size[::-1] != shape else grey)
        merged |= mask > (127 if mask.max() > 127 else 0)
    return merged
