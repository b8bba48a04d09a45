"""Backbones by name, for evaluation: random, timm, ImageNet, ours, or a folder; and what they were pretrained on."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

import uscl_hub
from training import imagenet
from training.evaluation.leaks import LeakError, find_leaks, refuse_leaks  # noqa: F401  (their name here before)
from training.evaluation.task import EvaluationError
from uscl_hub import models
from uscl_hub.checkpoints import check_folder
from uscl_hub.errors import UserError
from uscl_hub.preprocess import MEAN, STD


@dataclass
class Backbone:
    """model: eval mode, images (B, 3, px, px) -> features (B, d). px: of its input. mean, std: a number a channel, or
    one. sha: of the weights. provenance: `uscl_hub` of the folder's config.json, None if there is none."""

    name: str
    spec: str
    model: nn.Module
    architecture: str
    px: int
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]
    sha: str
    provenance: dict | None

    @property
    def key(self) -> list:
        """JSON values that tell its features from those of others, at one size of the input: for caches."""
        return [self.architecture, self.sha, self.mean, self.std]


def split_name(spec: str) -> tuple[str, str]:
    """'name=spec' -> (name, spec); 'spec' -> (spec, spec), a folder by its own name, 'export' by its parent's; an
    input size after it stays part of the name."""
    name, equals, rest = spec.partition("=")
    if equals:
        return name, rest
    path, size = split_px(spec)
    if not Path(path).is_dir():
        return spec, spec
    folder = Path(path).parent if Path(path).name == "export" else Path(path)
    return folder.name + (f"@{size}" if size else ""), spec


def split_px(spec: str) -> tuple[str, int]:
    """'name=spec@112' or 'spec@112' -> ('spec', 112); without a size, or if a folder is called so: 0."""
    spec = spec.partition("=")[2] or spec
    match = re.fullmatch(r"(.+)@([1-9]\d*)", spec)
    return (match[1], int(match[2])) if match and not Path(spec).is_dir() else (spec, 0)


def is_random(spec: str) -> bool:
    return bool(re.fullmatch(r"random:.*|timm:(?!.*:pretrained$).*", split_px(spec)[0]))


def is_imagenet(spec: str) -> bool:
    return bool(re.fullmatch(r"imagenet(:.*)?", split_px(spec)[0]))


def load_backbone(spec: str, seed: int = 0, px: int = 0) -> Backbone:
    """Any backbone that evaluate.py's --backbones documents.

    seed: of random weights, and what '{seed}' in the spec becomes. px: side of the input, 0 for the backbone's own; a
    size in the spec comes first.
    Raises EvaluationError for an unknown spec, CheckpointError for a damaged folder.
    """
    name, untrained = split_name(spec)[0], is_random(spec)
    spec, size = split_px(spec.replace("{seed}", str(seed)))
    px = size or px
    try:
        model, provenance = _create(spec, untrained, seed, px)
    except UserError:
        raise
    except (OSError, RuntimeError, ValueError) as error:  # timm's and the Hub's: no such model, no connection
        raise EvaluationError(f"backbone {spec!r} cannot be loaded: {error}") from error
    cfg = model.pretrained_cfg
    mean, std = (MEAN, STD) if untrained else (cfg["mean"], cfg["std"])
    px = px or cfg["input_size"][-1]
    return Backbone(name, spec, model.eval(), cfg["architecture"], px, mean, std, weights_sha(model), provenance)


def _create(spec: str, untrained: bool, seed: int, px: int) -> tuple[nn.Module, dict | None]:
    if Path(spec).is_dir():
        config = check_folder(spec)
        size = models.size_arguments(config["architecture"], px)
        model = timm.create_model(f"local-dir:{Path(spec).resolve()}", pretrained=True, num_classes=0, **size)
        return model, config.get("uscl_hub")
    if spec.startswith(("random:", "timm:")):
        architecture = spec.split(":")[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = models.size_arguments(architecture, px)
            return timm.create_model(architecture, pretrained=not untrained, num_classes=0, **size), None
    if is_imagenet(spec):
        found = imagenet.load(spec.partition(":")[2] or "lite0")
        about = {"method": "ImageNet classification", "licence": imagenet.LICENCE, "weights_sha256": found.sha256}
        return found.model, about
    if spec.startswith("meta_uscl_"):
        model = uscl_hub.load_meta_uscl_backbone(spec)
        return model, models.provenance(f"{model.pretrained_cfg['architecture']}.{model.pretrained_cfg['tag']}")
    raise EvaluationError(
        f"backbone {spec!r} is neither a folder nor random:NAME, timm:NAME, timm:NAME:pretrained, "
        "imagenet[:lite0] or meta_uscl_NAME[.tag], each with @PX for an input size of its own"
    )


def weights_sha(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + str(value.dtype).encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
