"""Images with the masks of their lesions, and how well predicted masks agree with them."""

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import segmentation_models_pytorch as smp
import torch

from training.evaluation.frames import load_frames
from training.evaluation.task import Task
from uscl_hub.clips import UnreadableClip, iter_frames
from uscl_hub.dataset import read_mask
from uscl_hub.errors import UserError
from uscl_hub.preprocess import resize


@dataclass(frozen=True)
class Lesions:
    """images: uint8 (N, px, px); masks: bool (N, px, px), several lesions merged; sizes: int (N, 2), height and width
    of the images before they were squashed. Aligned with the task's items."""

    images: np.ndarray
    masks: np.ndarray
    sizes: np.ndarray

    def __getitem__(self, index) -> "Lesions":
        return Lesions(self.images[index], self.masks[index], self.sizes[index])

    @property
    def key(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.masks.tobytes()).hexdigest()


def load_lesions(task: Task, px: int, cache: Path) -> Lesions:
    """All images and masks of a task; of a file of several frames, the first one.

    A mask that is unreadable, empty or of another size than its image moves the item to task.excluded.
    """
    masks, sizes, kept = [], [], []
    for item in task.items:
        try:
            frame, _ = next(iter_frames(item.clip, 1, notes=[]))
            mask = resize(read_mask(item, frame.shape).astype(np.uint8) * 255, px) > 127
            if not mask.any():
                names = ", ".join(path.name for path in item.masks) or "no file"
                raise UserError(f"nothing is marked in {names}")
        except UnreadableClip as error:
            task.excluded.append((item.id, f"unreadable: {error.reason}"))
        except UserError as error:
            task.excluded.append((item.id, f"unusable mask: {_without_folder(error, item)}"))
        else:
            masks.append(mask)
            sizes.append(frame.shape)
            kept.append(item)
    task.items = kept
    frames, places = load_frames(task, px, cache), {item.id: i for i, item in enumerate(kept)}
    rows = [places[item.id] for item in task.items]  # without those that cannot be decoded as a whole
    first = np.searchsorted(frames.item, np.arange(len(task.items)))
    masks, sizes = np.array(masks, bool).reshape(-1, px, px), np.array(sizes, int).reshape(-1, 2)
    return Lesions(frames.images[first], masks[rows], sizes[rows])


def _without_folder(error: UserError, item) -> str:
    text = str(error)
    for path in item.masks:
        text = text.replace(f"{path.parent}/", "")
    return text


def image_metrics(predicted: np.ndarray, lesions: Lesions) -> dict[str, np.ndarray]:
    """Dice, PPV and sensitivity of every image, 0 where nothing is predicted, and HD95; float (N,) each.

    HD95: the 95th percentile of the distances between the outlines (monai's), in pixels of the image before it was
    squashed; where nothing is predicted, the image's diagonal. predicted: bool (N, px, px).
    """
    both = (torch.from_numpy(m[:, None]).long() for m in (predicted, lesions.masks))
    stats = smp.metrics.get_stats(*both, mode="binary")
    metrics = {
        "Dice": smp.metrics.f1_score,
        "PPV": smp.metrics.positive_predictive_value,
        "sensitivity": smp.metrics.sensitivity,
    }
    found = {name: f(*stats, reduction="none", zero_division=0.0).numpy()[:, 0] for name, f in metrics.items()}
    return found | {"HD95": outline_distance(predicted, lesions)}


def outline_distance(predicted: np.ndarray, lesions: Lesions) -> np.ndarray:
    """HD95 as in `image_metrics`, float (N,)."""
    from monai.metrics import compute_hausdorff_distance  # here: it takes seconds to import

    result = np.hypot(*lesions.sizes.T).astype(float)
    marked = predicted.any((1, 2))
    if marked.any():
        truth, own = (torch.from_numpy(m[marked][:, None]).float() for m in (lesions.masks, predicted))
        spacing = (lesions.sizes[marked] / predicted.shape[1:]).tolist()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="monai")  # of monai's own calls
            found = compute_hausdorff_distance(own, truth, include_background=True, percentile=95, spacing=spacing)
        result[marked] = found[:, 0].numpy()
    return result
