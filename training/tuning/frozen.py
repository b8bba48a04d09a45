"""A scikit-learn head on frozen features, and the same head as the last layer of a network."""

import warnings

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn

from training.evaluation.backbones import Backbone
from training.evaluation.features import compute
from training.tuning.pixels import Pixels
from training.tuning.problem import Problem


def mirrored_features(backbone: Backbone, pixels: Pixels, device: str) -> np.ndarray:
    """float32 (2, N, d): of every frame, and of its mirror image."""
    both = (pixels.images, np.ascontiguousarray(pixels.images[..., ::-1]))
    return np.stack([compute(backbone.model, backbone, images, device).numpy() for images in both])


def fit(
    problem: Problem, x: np.ndarray, target: np.ndarray, weight: np.ndarray, c: float
) -> tuple[np.ndarray, np.ndarray]:
    """The linear head of logits x @ w.T + b; mirror images serve as further examples.

    Args:
        x: float32 (2, N, d), from `mirrored_features`.
        target: as encoded, of every frame: int (N,) or float32 (N, outputs).
        weight: float (N,), of a frame: what an item's frames share.
        c: C of the logistic regression; a ridge has alpha = 1 / c.

    Returns:
        w (outputs, d) and b (outputs,), float64.
    """
    x, target, weight = np.concatenate(x), np.concatenate([target] * 2), np.concatenate([weight] * 2) / 2
    scaler = StandardScaler().fit(x)
    x = scaler.transform(x)
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):  # threads cost more than they bring at this size
        warnings.simplefilter("ignore", ConvergenceWarning)
        if problem.task == "regression":
            model = Ridge(1 / c).fit(x, target, sample_weight=weight)
            w, b = np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)
        elif problem.task == "classification":
            model = LogisticRegression(C=c, max_iter=300).fit(x, target, sample_weight=weight * problem.weights[target])
            w, b = model.coef_, model.intercept_
            if len(w) == 1:  # two classes: half the margin each
                w, b = np.concatenate([-w, w]) / 2, np.concatenate([-b, b]) / 2
        else:
            heads = []
            for label in range(problem.outputs):
                positive = target[:, label] > 0
                balanced = np.where(positive, weight * problem.weights[label], weight)
                heads.append(LogisticRegression(C=c, max_iter=300).fit(x, positive, sample_weight=balanced))
            w, b = (np.concatenate([getattr(head, key) for head in heads]) for key in ("coef_", "intercept_"))
    w = w / scaler.scale_
    return w, b - w @ scaler.mean_


def install(model: nn.Module, w: np.ndarray, b: np.ndarray) -> None:
    """Put the head into the classifier of a timm model."""
    head = model.get_classifier()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(w))
        head.bias.copy_(torch.from_numpy(b))
