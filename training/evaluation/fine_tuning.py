"""Fine-tuning of a backbone's last block, or of everything, with a new linear head."""

import copy
from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from training.evaluation.backbones import Backbone
from training.evaluation.features import compute, to_input
from training.evaluation.task import EvaluationError
from training.method.fast_convolution import FastWeightGradients
from uscl_hub.models import width


@dataclass
class FineTune:
    """Adam with weight decay 1e-4 and a cosine schedule; the loss is on frames; the last epoch counts."""

    epochs: int
    """Passes over the training frames."""
    lr: float
    """Adam's learning rate at the start."""
    batch: int
    """Frames a step."""


def last_block(model: nn.Module) -> tuple[nn.Module, Callable]:
    """The last block of a timm model without classifier, and what follows it up to the pooled features."""
    if hasattr(model, "layer4"):  # ResNets
        return model.layer4[-1], model.forward_head
    if hasattr(model, "stages") and hasattr(model, "norm_pre"):  # ConvNeXt
        return model.stages[-1].blocks[-1], lambda x: model.forward_head(model.norm_pre(x))
    if isinstance(getattr(model, "blocks", None), nn.Sequential) and hasattr(model, "norm"):  # vision transformers
        return model.blocks[-1], lambda x: model.forward_head(model.norm(x))
    if hasattr(model, "blocks") and hasattr(model, "conv_head") and hasattr(model, "bn2"):  # EfficientNets: last stage
        return model.blocks[-1], lambda x: model.forward_head(model.bn2(model.conv_head(x)))
    raise EvaluationError(
        f"the last block of a {type(model).__name__} is not known here; leave 'finetune_last' out of "
        "--protocols (ResNets, ConvNeXt, EfficientNets and vision transformers have it)"
    )


def before_last_block(backbone: Backbone, images: np.ndarray, device: str) -> torch.Tensor:
    """Activations that enter the last block, float32 (N, ...): the frozen part runs once for all folds."""
    block, _ = last_block(backbone.model)
    entered = []
    handle = block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))

    def forward(x):
        entered.clear()
        backbone.model(x)
        return entered[0]

    try:
        return compute(forward, backbone, images, device)
    finally:
        handle.remove()


class Classifier(nn.Module):
    """A copy of the backbone, or of its last block and what follows, with a new linear head."""

    def __init__(self, model: nn.Module, classes: int, last: bool):
        super().__init__()
        model = copy.deepcopy(model)
        self.body, self.after = last_block(model) if last else (model, nn.Identity())
        self.head = nn.Linear(width(model), classes)

    def forward(self, x):
        return self.head(self.after(self.body(x)))


@dataclass(frozen=True)
class Tuning:
    """How a copy of the backbone is trained. last: only its last block. kind: of the task, 'classification',
    'multilabel' or 'regression'; outputs: classes, labels or values."""

    last: bool
    recipe: FineTune
    outputs: int
    seed: int
    device: str
    kind: str = "classification"


def finetune(
    backbone: Backbone,
    tuning: Tuning,
    train: np.ndarray | torch.Tensor,
    targets: np.ndarray,
    test: np.ndarray | torch.Tensor,
) -> np.ndarray:
    """Train the last block and a head on activations that enter it, or everything on images with random horizontal
    flips. Returns the last epoch's probabilities (for regression, values) of `test`, float (M, outputs).

    With tuning.last this is the paper's 'last_three': the same parameters, optimizer and schedule as in the authors'
    code; but the frozen part stays in eval mode, images are not augmented, and no epoch is chosen by the test fold.
    targets: int (N,) for classification, else float (N, outputs); a regression learns them standardised.
    """
    loss_of, finish, goal = _goal(tuning.kind, targets)
    last, recipe, device = tuning.last, tuning.recipe, tuning.device
    prepare = (lambda x: x.to(device)) if last else (lambda x: to_input(x, backbone).to(device))
    with torch.random.fork_rng(devices=[]), FastWeightGradients():
        torch.manual_seed(tuning.seed)
        model = Classifier(backbone.model, tuning.outputs, last)
        model = model.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
        goal = goal.to(device)
        for _ in range(recipe.epochs):
            # equal batches of at most recipe.batch: batch normalisation has no statistics of a left-over frame
            for index in torch.randperm(len(train)).tensor_split(-(-len(train) // recipe.batch)):
                x = prepare(train[index.numpy()])
                if not last:
                    x = torch.where(torch.rand(len(x), 1, 1, 1).to(device) < 0.5, x.flip(-1), x)
                loss = loss_of(model(x), goal[index.to(device)])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        output = torch.cat([model(prepare(test[i : i + 64])).double().cpu() for i in range(0, len(test), 64)])
    if not torch.isfinite(output).all():
        raise EvaluationError(f"fine-tuning {backbone.name} diverged (lr {recipe.lr}): lower its learning rate")
    return finish(output).numpy()


def _goal(kind: str, targets: np.ndarray) -> tuple[Callable, Callable, torch.Tensor]:
    """The loss, what makes predictions of the outputs, and the targets that the loss takes."""
    if kind == "classification":
        return F.cross_entropy, lambda logits: logits.softmax(1), torch.from_numpy(targets)
    goal = torch.from_numpy(np.asarray(targets, np.float32))
    if kind == "multilabel":
        return F.binary_cross_entropy_with_logits, torch.sigmoid, goal
    mean, std = goal.mean(0), goal.std(0, unbiased=False).clamp(min=1e-8)
    return F.mse_loss, lambda output: output * std.double() + mean.double(), (goal - mean) / std
