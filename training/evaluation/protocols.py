"""How a backbone is judged: kNN, linear probe, fine-tuning the last block, fine-tuning everything.

Each protocol trains on the frames of some folds and returns class probabilities of the frames of another. Choices
(the regularisation) are made inside the training folds, by group; nothing looks at the test fold.
"""

import copy
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn

from training.evaluation.backbones import Backbone
from training.evaluation.datasets import EvaluationError, Frames, Task, TaskError, cached, label_subset
from training.method.fast_convolution import FastWeightGradients
from uscl_hub.preprocess import normalise

PROTOCOLS = ("knn", "linear", "finetune_last", "finetune_full")


@dataclass
class FineTune:
    """Adam with weight decay 1e-4 and a cosine schedule, cross-entropy on frames; the last epoch counts."""

    epochs: int
    """Passes over the training frames."""
    lr: float
    """Adam's learning rate at the start."""
    batch: int
    """Frames a step."""


def to_input(images: np.ndarray, backbone: Backbone) -> torch.Tensor:
    """uint8 (N, px, px) -> float32 (N, 3, px, px), normalised as the backbone expects."""
    mean, std = (v[0] if np.ndim(v) and len(set(v)) == 1 else v for v in (backbone.mean, backbone.std))
    return normalise(images, 3, mean, std)


# ------------------------------------------------------------------------------------------------ frozen features


@torch.inference_mode()
def compute(forward: Callable, backbone: Backbone, images: np.ndarray, device: str, batch: int = 64) -> torch.Tensor:
    """forward of all images in eval mode, float32 on the CPU."""
    backbone.model.to(device, memory_format=torch.channels_last).eval()
    chunks = (images[i : i + batch] for i in range(0, len(images), batch))
    return torch.cat([forward(to_input(chunk, backbone).to(device)).float().cpu() for chunk in chunks])


def features(backbone: Backbone, frames: Frames, cache: Path, device: str) -> np.ndarray:
    """float32 (N, d) of all frames, computed once. Raises EvaluationError if they are not finite."""
    described = ["features", backbone.sha, backbone.mean, backbone.std, frames.key]

    def make():
        return {"x": compute(backbone.model, backbone, frames.images, device).numpy()}

    values = cached(cache, described, make)["x"]
    if not np.isfinite(values).all():
        raise EvaluationError(
            f"{backbone.name} ({backbone.spec}): its features are not finite; the checkpoint is broken"
        )
    return values


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int = 20) -> np.ndarray:
    """Share of each class among the k training frames of highest cosine similarity, float (M, classes)."""
    if len(train) < k:
        raise TaskError(f"kNN needs at least {k} training frames, there are {len(train)}; use a larger label fraction")
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, labels)
    return model.predict_proba(test)


def linear(train: np.ndarray, labels: np.ndarray, groups: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    """Logistic regression on standardised features, float (M, classes).

    C in 1e-4 ... 1 is the best macro-F1 of 3 folds by group within the training frames; with a class in fewer than 2
    training groups there is nothing to choose on, and C is 1e-2.
    """
    model = make_pipeline(StandardScaler(), LogisticRegression(C=1e-2, max_iter=300))
    smallest = min(len(set(groups[labels == label])) for label in set(labels))
    kwargs = {}
    if smallest > 1:
        inner = StratifiedGroupKFold(min(3, smallest), shuffle=True, random_state=seed)
        model = GridSearchCV(model, {"logisticregression__C": np.logspace(-4, 0, 5)}, scoring="f1_macro", cv=inner)
        kwargs = {"groups": groups}
    # one thread: on matrices of this size threads cost more than they bring, the more on a busy machine
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)  # a candidate that has not converged may be compared
        return model.fit(train, labels, **kwargs).predict_proba(test)


# --------------------------------------------------------------------------------------------------- fine-tuning


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


class _Classifier(nn.Module):
    """A copy of the backbone, or of its last block and what follows, with a new linear head."""

    def __init__(self, model: nn.Module, classes: int, last: bool):
        super().__init__()
        model = copy.deepcopy(model)
        self.body, self.after = last_block(model) if last else (model, nn.Identity())
        # some heads (MobileNetV3) widen the pooled features
        self.head = nn.Linear(getattr(model, "head_hidden_size", None) or model.num_features, classes)

    def forward(self, x):
        return self.head(self.after(self.body(x)))


def finetune(
    backbone: Backbone,
    last: bool,
    train: np.ndarray | torch.Tensor,
    labels: np.ndarray,
    test: np.ndarray | torch.Tensor,
    classes: int,
    recipe: FineTune,
    seed: int,
    device: str,
) -> np.ndarray:
    """Train the last block and a head on activations that enter it, or (last=False) everything on images with random
    horizontal flips. Returns the last epoch's probabilities of `test`, float (M, classes).

    With last this is the paper's 'last_three': the same parameters, optimizer and schedule as in the authors' code;
    but the frozen part stays in eval mode, images are not augmented, and no epoch is chosen by the test fold.
    """
    prepare = (lambda x: x.to(device)) if last else (lambda x: to_input(x, backbone).to(device))
    with torch.random.fork_rng(devices=[]), FastWeightGradients():
        torch.manual_seed(seed)
        model = _Classifier(backbone.model, classes, last).to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
        target = torch.from_numpy(labels).to(device)
        for _ in range(recipe.epochs):
            # equal batches of at most recipe.batch: batch normalisation has no statistics of a left-over frame
            for index in torch.randperm(len(train)).tensor_split(-(-len(train) // recipe.batch)):
                x = prepare(train[index.numpy()])
                if not last:
                    x = torch.where(torch.rand(len(x), 1, 1, 1).to(device) < 0.5, x.flip(-1), x)
                loss = F.cross_entropy(model(x), target[index.to(device)])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            schedule.step()
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(prepare(test[i : i + 64])).double().cpu() for i in range(0, len(test), 64)])
    if not torch.isfinite(logits).all():
        raise EvaluationError(f"fine-tuning {backbone.name} diverged (lr {recipe.lr}): lower its learning rate")
    return logits.softmax(1).numpy()


# ------------------------------------------------------------------------------------------------ out-of-fold runs


def out_of_fold(
    protocol: str,
    inputs: Callable[[], np.ndarray | torch.Tensor],
    task: Task,
    frames: Frames,
    folds: np.ndarray,
    fraction: float,
    seed: int,
    backbone: Backbone,
    recipe: FineTune | None,
    device: str,
    cache: Path,
    done: Callable = lambda: None,
) -> np.ndarray:
    """Class probabilities of every frame, each from a model that has seen neither its group nor its fold.

    inputs: gives, for every frame, features (N, d) for frozen protocols, activations before the last block for
    finetune_last, uint8 images (N, px, px) for finetune_full. folds: int (items,). fraction: share of the groups of
    each class that keep their label in the training part. Finished folds are kept in `cache`; done: called after each.
    Returns float (N, classes).
    """
    item, labels, groups, classes = frames.item, task.labels, task.groups, len(task.classes)
    result = np.full((len(item), classes), np.nan)
    described = ["fold", backbone.sha, backbone.mean, backbone.std, frames.key, labels.tolist(), folds.tolist()]
    described += [protocol, fraction, seed, recipe and asdict(recipe)]
    for fold in range(folds.max() + 1):
        training = np.flatnonzero(folds != fold)
        training = training[label_subset(labels[training], groups[training], fraction, seed)]
        train, test = np.flatnonzero(np.isin(item, training)), np.flatnonzero(folds[item] == fold)
        y, g = labels[item[train]], groups[item[train]]
        assert not set(g) & set(groups[item[test]])
        if len(set(y)) < classes:
            raise TaskError(f"fold {fold}: {fraction:.0%} of the labels leave a class without a training item")

        def make():
            x = inputs()
            if protocol == "knn":
                return {"scores": knn(x[train], y, x[test])}
            if protocol == "linear":
                return {"scores": linear(x[train], y, g, x[test], seed)}
            last = protocol == "finetune_last"
            return {"scores": finetune(backbone, last, x[train], y, x[test], classes, recipe, seed, device)}

        result[test] = cached(cache, [*described, fold], make)["scores"]
        done()
    return result


def pool_frames(values: np.ndarray, item: np.ndarray, items: int) -> np.ndarray:
    """Mean over each item's frames, float (items, d). values: (N, d); item: int (N,)."""
    total = np.zeros((items, values.shape[1]))
    np.add.at(total, item, values)
    return total / np.bincount(item, minlength=items)[:, None]
