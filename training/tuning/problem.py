"""What one kind of task means: targets as numbers, loss, imbalance, and what the outputs say."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from training.tuning.pixels import Pixels
from uscl_hub.classifier import probabilities
from uscl_hub.labels import Labels


@dataclass(frozen=True)
class Problem:
    """task, names: of Labels. weights: float32 (names,), of a class in the loss (multilabel: of a label's positives).
    mean, std: float32 (names,), of the targets of a regression, else 0 and 1."""

    task: str
    names: tuple[str, ...]
    weights: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @property
    def outputs(self) -> int:
        return len(self.names)

    def encode(self, targets: np.ndarray) -> np.ndarray:
        """Targets as the loss wants them: regression standardised."""
        return ((targets - self.mean) / self.std).astype(np.float32) if self.task == "regression" else targets

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """logits (B, outputs), or (B, 1, H, W) with target bool (B, H, W)."""
        weights = torch.from_numpy(self.weights).to(logits.device)
        if self.task == "classification":
            return F.cross_entropy(logits, target, weight=weights)
        if self.task == "multilabel":
            return F.binary_cross_entropy_with_logits(logits, target, pos_weight=weights)
        if self.task == "regression":
            return F.smooth_l1_loss(logits, target)
        target = target[:, None].float()
        p = logits.sigmoid()
        both, either = (p * target).sum((1, 2, 3)), (p + target).sum((1, 2, 3))
        return F.binary_cross_entropy_with_logits(logits, target) + (1 - (2 * both + 1) / (either + 1)).mean()

    def say(self, logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
        """Probabilities of every frame (or pixel); regression: values in the targets' own unit. float64."""
        if self.task == "regression":
            return logits.astype(np.float64) * self.std + self.mean
        return probabilities(self.task, logits, temperature)


def describe(found: Labels) -> Problem:
    """Balanced weights: of a class items / (classes x its items), of a label's positives negatives / positives."""
    k = len(found.classes)
    weights, mean, std = np.ones(k), np.zeros(k), np.ones(k)
    if found.task in ("classification", "multilabel"):
        weights = balanced(found.task, found.targets, k)
    elif found.task == "regression":
        mean, std = found.targets.mean(0, dtype=np.float64), found.targets.std(0, dtype=np.float64)
    return Problem(found.task, found.classes, *(v.astype(np.float32) for v in (weights, mean, std)))


def balanced(task: str, targets: np.ndarray, outputs: int) -> np.ndarray:
    """Weights by which the classes of these targets, or a label's positives and negatives, count alike, (outputs,)."""
    if task == "classification":
        return len(targets) / (outputs * np.bincount(targets, minlength=outputs).clip(min=1))
    positive = targets.sum(0)
    return (len(targets) - positive) / positive.clip(min=1)


def pool(values: np.ndarray, item: np.ndarray, items: int) -> np.ndarray:
    """Mean over each item's frames, float64 (items, d). values: (N, d); item: int (N,)."""
    total = np.zeros((items, values.shape[1]))
    np.add.at(total, item, values)
    return total / np.bincount(item, minlength=items)[:, None]


def item_scores(problem: Problem, logits: np.ndarray, pixels: Pixels, temperature: float = 1.0) -> np.ndarray:
    """What is judged of every item, float (items, d): pooled probabilities or values; Dice of a segmentation."""
    if problem.task == "segmentation":
        return dice(logits[:, 0] > 0, pixels.masks)[:, None]
    return pool(problem.say(logits, temperature), pixels.item, pixels.item.max() + 1)


def dice(predicted: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Of every image, float (N,): 1 where nothing is marked and nothing is found. bool (N, px, px) both."""
    both, size = (predicted & masks).sum((1, 2)), predicted.sum((1, 2)) + masks.sum((1, 2))
    return np.where(size > 0, 2 * both / np.maximum(size, 1), 1.0)


def fit_temperature(problem: Problem, logits: np.ndarray, targets: np.ndarray, pixels: Pixels) -> float:
    """What logits are divided by so that out-of-fold probabilities, pooled over frames, have the lowest log loss.

    Classes count alike, as in training. 1 for regression. Between 0.05 and 20.
    """
    if problem.task == "regression":
        return 1.0
    if problem.task == "segmentation":  # every 4th pixel each way says enough
        logits, truth = logits[:, 0, ::4, ::4].astype(np.float64), pixels.masks[:, ::4, ::4]

        def cost(t):
            return np.logaddexp(0, np.where(truth, -logits, logits) / t).mean()
    else:

        def cost(t):
            return log_loss(problem, item_scores(problem, logits, pixels, t), targets)

    found = minimize_scalar(lambda v: cost(np.exp(v)), bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def log_loss(problem: Problem, probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean over classes (of a label: over its positives and negatives) of the mean over their items."""
    p, weight = probabilities.clip(1e-7, 1 - 1e-7), balance(problem, targets)
    truth = np.eye(problem.outputs)[targets] if problem.task == "classification" else targets
    each = -np.log(np.where(truth > 0, p, 1 - p))
    if problem.task == "classification":
        each, weight = each[truth > 0], weight[:, 0]
    return float((weight * each).sum() / weight.sum())


def balance(problem: Problem, targets: np.ndarray) -> np.ndarray:
    """Weight of every item for every output, float (items, outputs), by which classes count alike."""
    if problem.task == "classification":
        return np.repeat(problem.weights[targets][:, None], problem.outputs, axis=1)
    return np.where(targets > 0, problem.weights, 1.0)
