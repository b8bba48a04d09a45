"""What is tried: frozen features, because they cost next to nothing, then by promise the whole network at two learning
rates and the last stages."""

from dataclasses import dataclass

from timm.models import group_parameters
from torch import nn

WEIGHT_DECAY = 0.05
WARM_UP = 0.1  # share of the steps
BATCH = 32
CHECKS = 8  # times, at most, that the held-out fold is looked at in a training: where it may stop
EPOCHS = (24, 12, 6, 3)  # the longest that the minutes allow
SHRINKAGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C of the logistic regression, 1 / alpha of the ridge


@dataclass(frozen=True)
class Recipe:
    """depth: 'frozen', 'last' or 'whole': what is trained beside the head. lr: of the head. epochs: of the schedule,
    1 until the plan has decided; 0 for a scikit-learn head. decay: of the rate from one layer to the one below."""

    name: str
    depth: str
    lr: float = 0.0
    epochs: int = 0
    decay: float = 0.75


def recipes(task: str) -> tuple[Recipe, ...]:
    """In the order in which they are tried. epochs are decided by the plan."""
    frozen = (
        Recipe("frozen backbone, decoder", "frozen", 2e-3, 1)
        if task == "segmentation"
        else Recipe("frozen features", "frozen")
    )
    return (
        frozen,
        Recipe("whole network, lr 1e-3", "whole", 1e-3, 1, 0.95),
        Recipe("whole network, lr 3e-4", "whole", 3e-4, 1),
        Recipe("last stages", "last", 1e-3, 1),
    )


def freeze(model: nn.Module, depth: str) -> None:
    """Leave what `depth` says trainable; a module of frozen weights alone goes on in eval mode (batch norm).

    model: has timm's group_matcher. The last stages are the last third of its coarse groups, the head included.
    """
    if depth == "whole":
        return
    groups = group_parameters(model, model.group_matcher(coarse=True))
    limit = len(groups) - 1 if depth == "frozen" else -(-len(groups) * 2 // 3)
    trained = {name for level, names in groups.items() if level >= limit for name in names}
    for name, weight in model.named_parameters():
        weight.requires_grad = name in trained
    for module in model.modules():
        own = list(module.parameters())
        if own and not any(weight.requires_grad for weight in own):
            module.eval()
