"""A model that `training/finetune.py` has exported: loading it, and what its outputs mean."""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from scipy.special import expit, softmax
from torch import nn

from uscl_hub import checkpoints, tensors
from uscl_hub.checkpoints import CONFIG_NAME, WEIGHTS_NAME, CheckpointError
from uscl_hub.clips.crop import apply_region, detect_region
from uscl_hub.preprocess import create_transform, normalise, resize, to_grey
from uscl_hub.unet import UNet

TASKS = ("classification", "multilabel", "regression", "segmentation")


@dataclass(frozen=True)
class Meaning:
    """What the outputs of a fine-tuned model are: from its config.json.

    task: one of TASKS. labels: a name for each output. temperature: what logits are divided by. mean, std: of the
    targets of a regression, float64 (labels,). crop: how images were cropped for it: 'none', 'crop' or 'blank'. rate:
    frames a second that it saw of a video, 0: all. sha256: of the weights.
    """

    task: str
    labels: tuple[str, ...]
    temperature: float
    mean: np.ndarray
    std: np.ndarray
    crop: str
    rate: float
    sha256: str

    def say(self, logits: np.ndarray) -> np.ndarray:
        """Logits (N, outputs, ...) -> probabilities in [0, 1], or values of a regression; float64 of the same shape.

        >>> meaning = Meaning("classification", ("benign", "malignant"), 2.0, np.zeros(2), np.ones(2), "none", 0, "")
        >>> meaning.say(np.array([[0.0, 0.0]]))
        array([[0.5, 0.5]])
        """
        if self.task == "regression":
            return logits.astype(np.float64) * self.std + self.mean
        return probabilities(self.task, logits, self.temperature)


def probabilities(task: str, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Logits (N, outputs, ...) -> float64: softmax over the outputs of a classification, else a sigmoid of each.

    >>> probabilities("multilabel", np.zeros((1, 2)))
    array([[0.5, 0.5]])
    """
    scaled = logits.astype(np.float64) / temperature
    return softmax(scaled, axis=1) if task == "classification" else expit(scaled)


def load_classifier(path):
    """A model that training/finetune.py has exported, ready for use, in one call.

    path: its folder `export`. Returns (model, transform, labels): an nn.Module in eval mode, float32 (B, 3, px, px) ->
    logits (B, labels), of a segmentation (B, 1, px, px); what makes its input of a PIL image, array or tensor; and the
    names of its outputs. A model that was trained on crops has its images cropped as `uscl-hub predict` crops a single
    image; of a clip, that looks for the moving region in all frames together. `read_meaning` has the temperature.
    Raises CheckpointError, naming the file, if the folder is damaged or is not of training/finetune.py.

        model, transform, labels = uscl_hub.load_classifier("runs/mine/export")
        label = labels[model(transform(image)[None]).argmax()]
    """
    meaning = read_meaning(path)
    cfg, *_ = checkpoints.read_config(path)
    if meaning.task == "segmentation":
        model: nn.Module = _load_unet(Path(path), len(meaning.labels))
    else:
        checkpoints.check_folder(path)
        model = timm.create_model(f"local-dir:{Path(path).resolve()}", pretrained=True)
    size, mean, std = cfg["input_size"], cfg["mean"], cfg["std"]
    transform = create_transform({"input_size": size, "mean": mean, "std": std})
    if meaning.crop != "none":
        transform = partial(_cropped, crop=meaning.crop, **transform.keywords)
    return model.eval(), transform, list(meaning.labels)


def _cropped(image, *, crop: str, size: int, **scale) -> torch.Tensor:
    """scale: what `normalise` takes."""
    grey = to_grey(image)
    grey = np.ascontiguousarray(apply_region(grey, detect_region(grey[None]), crop))
    return normalise(resize(grey, size), **scale)


def check_export(folder) -> dict:
    """`checkpoints.check_folder`, also of a U-Net, which is no network of timm's; of a model of training/finetune.py,
    what its outputs are, too."""
    *_, config = checkpoints.read_config(folder)
    about = config.get("uscl_hub")
    meaning = read_meaning(folder) if isinstance(about, dict) and "task" in about else None
    if meaning is None or meaning.task != "segmentation":
        return checkpoints.check_folder(folder)
    _load_unet(Path(folder), len(meaning.labels))
    return config


def _load_unet(folder: Path, outputs: int) -> UNet:
    cfg, architecture, _, config = checkpoints.read_config(folder)
    checkpoints.check_provenance(folder, config)
    if not timm.is_model(architecture):
        raise CheckpointError(f"{folder}: timm knows no architecture {tensors.shorten(architecture)!r}")

    def build():
        pretrained_cfg = {**cfg, "source": None, "file": None}
        return UNet(timm.create_model(architecture, features_only=True, pretrained_cfg=pretrained_cfg), outputs)

    file = folder / WEIGHTS_NAME
    with torch.device("meta"):  # no memory for a network that the file has no weights for
        shapes = {name: tuple(entry["shape"]) for name, entry in tensors.read_header(file).items()}
        tensors.check_shapes(shapes, build(), file)
    model = build()
    model.load_state_dict(tensors.check_values(checkpoints.load_tensors(file), model, where=file))
    return model


def read_meaning(path) -> Meaning:
    """What the outputs of an exported model are. Raises CheckpointError, naming config.json, if it does not say."""
    *_, config = checkpoints.read_config(path)
    where, about = Path(path) / CONFIG_NAME, config.get("uscl_hub")
    if not isinstance(about, dict) or about.get("task") not in TASKS:
        raise CheckpointError(
            f"{where}: is not a model of training/finetune.py: it has no task. Name its folder 'export'"
        )
    names, temperature = about.get("label_names"), about.get("temperature")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{where}: uscl_hub.label_names must be a list of names")
    if about["task"] != "segmentation" and config.get("num_classes") != len(names):
        found = config.get("num_classes")
        raise CheckpointError(f"{where}: num_classes is {found!r}, but uscl_hub.label_names has {len(names)} names")
    if not isinstance(temperature, (int, float)) or isinstance(temperature, bool) or not 0 < temperature < math.inf:
        raise CheckpointError(f"{where}: uscl_hub.temperature must be a number above 0, not {temperature!r}")
    if about.get("crop") not in ("none", "crop", "blank"):
        raise CheckpointError(f"{where}: uscl_hub.crop must be 'none', 'crop' or 'blank', not {about.get('crop')!r}")
    regression = about["task"] == "regression"
    mean, std = (
        np.array(about.get(key) if regression else [default] * len(names), np.float64)
        for key, default in (("target_mean", 0.0), ("target_std", 1.0))
    )
    if mean.shape != (len(names),) or std.shape != mean.shape or not np.isfinite([mean, std]).all():
        raise CheckpointError(f"{where}: uscl_hub.target_mean and target_std must have a number for each label")
    rate = about.get("rate", 0)
    if not isinstance(rate, (int, float)) or not 0 <= rate < math.inf:
        raise CheckpointError(f"{where}: uscl_hub.rate must be frames a second, not {rate!r}")
    crop = "none" if about["task"] == "segmentation" else about["crop"]  # masks are of the whole picture
    return Meaning(about["task"], tuple(names), temperature, mean, std, crop, rate, str(about.get("sha256")))


def run(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """Logits of a batch, float32, on the CPU."""
    with torch.inference_mode():
        return model(x.to(next(model.parameters()).device)).float().cpu().numpy()
