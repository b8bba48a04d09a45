"""Grad-CAM: where in an image a class was seen. Uses PyPI's `grad-cam`."""

import numpy as np
import torch

from training.evaluation.features import to_input
from training.tuning.network import Setting

SMALLEST = 4  # side of the feature map: a coarser one shows nothing


def layer(model: torch.nn.Module, px: int) -> tuple[str, torch.nn.Module] | None:
    """The deepest stage whose map has SMALLEST pixels a side or more; None where timm does not say (transformers)."""
    stages = [s for s in getattr(model, "feature_info", ()) if isinstance(s, dict) and px // s["reduction"] >= SMALLEST]
    modules = dict(model.named_modules())
    named = [s["module"] for s in stages if s["module"] in modules]
    if not named or hasattr(model, "patch_embed"):
        return None
    return named[-1], modules[named[-1]]


def overlays(model: torch.nn.Module, setting: Setting, frames: np.ndarray, outputs: np.ndarray) -> np.ndarray | None:
    """Heat of one output an image, float32 (n, px, px) in [0, 1]; None without a fitting layer.

    Raises ImportError if grad-cam is not installed.
    """
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    found = layer(model, setting.pixels.px)
    if found is None:
        return None
    x = to_input(setting.pixels.images[frames], setting.backbone)
    with GradCAM(model=model, target_layers=[found[1]]) as cam:
        return cam(input_tensor=x, targets=[ClassifierOutputTarget(int(o)) for o in outputs])
