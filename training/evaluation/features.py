"""Frozen features of a backbone: computed once, kept in the cache."""

from pathlib import Path
from typing import Callable

import numpy as np
import torch

from training.evaluation.backbones import Backbone
from training.evaluation.frames import TaskFrames, cached
from training.evaluation.task import EvaluationError
from uscl_hub.preprocess import normalise


def to_input(images: np.ndarray, backbone: Backbone) -> torch.Tensor:
    """uint8 (N, px, px) -> float32 (N, 3, px, px), normalised as the backbone expects."""
    mean, std = (v[0] if np.ndim(v) and len(set(v)) == 1 else v for v in (backbone.mean, backbone.std))
    return normalise(images, 3, mean, std)


@torch.inference_mode()
def compute(forward: Callable, backbone: Backbone, images: np.ndarray, device: str, batch: int = 64) -> torch.Tensor:
    """forward of all images in eval mode, float32 on the CPU."""
    backbone.model.to(device, memory_format=torch.channels_last).eval()
    chunks = (images[i : i + batch] for i in range(0, len(images), batch))
    return torch.cat([forward(to_input(chunk, backbone).to(device)).float().cpu() for chunk in chunks])


def cached_features(backbone: Backbone, frames: TaskFrames, cache: Path, device: str) -> np.ndarray:
    """float32 (N, d) of all frames, computed once. Raises EvaluationError if they are not finite."""
    described = ["features", *backbone.key, frames.key]

    def make():
        return {"x": compute(backbone.model, backbone, frames.images, device).numpy()}

    values = cached(cache, described, make)["x"]
    if not np.isfinite(values).all():
        raise EvaluationError(
            f"{backbone.name} ({backbone.spec}): its features are not finite; the checkpoint is broken"
        )
    return values
