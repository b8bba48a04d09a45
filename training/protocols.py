"""How a backbone is judged: kNN, linear probe, fine-tuning the last block, fine-tuning everything.

Each protocol trains on the frames of some folds and returns class probabilities of the frames of another. Choices
(the regularisation) are made inside the training folds, by group; nothing looks at the test fold.
"""

import copy
import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from training.backbones import Backbone
from training.tasks import Frames, TaskError, label_subset
from uscl_hub.preprocess import normalise

FROZEN = ("knn", "linear")
PROTOCOLS = {
    "knn": "kNN (k = 20, cosine)",
    "linear": "linear probe",
    "finetune_last": "fine-tune last block",
    "finetune_full": "fine-tune all",
}


@dataclass
class FineTune:
    """One fine-tuning recipe: Adam at a constant rate, cross-entropy on frames, no choice made on the test fold."""

    epochs: int
    lr: float
    batch: int
    flip: bool


def to_input(images: np.ndarray, backbone: Backbone) -> torch.Tensor:
    """uint8 (N, px, px) -> float32 (N, 3, px, px), normalised as the backbone expects."""
    same = len(set(backbone.mean)) == 1 and len(set(backbone.std)) == 1
    return normalise(images, 3, *((backbone.mean[0], backbone.std[0]) if same else (backbone.mean, backbone.std)))


# ----------------------------------------------------------------------------------------- features, computed once


@torch.inference_mode()
def compute(forward: Callable, backbone: Backbone, images: np.ndarray, device: str, batch: int = 128) -> torch.Tensor:
    """forward over all images, float32 on the CPU."""
    backbone.model.to(device).eval()
    return torch.cat(
        [
            forward(to_input(images[i : i + batch], backbone).to(device)).float().cpu()
            for i in range(0, len(images), batch)
        ]
    )


def features(backbone: Backbone, frames: Frames, cache: Path, device: str) -> np.ndarray:
    """float32 (N, d) of all frames, cached by the weights' hash and the frames'. Raises ValueError if not finite."""
    normalisation = hashlib.sha256(repr((backbone.mean, backbone.std)).encode()).hexdigest()[:6]
    file = Path(cache) / f"features-{backbone.sha[:16]}-{normalisation}-{frames.key}.npy"
    if not file.exists():
        values = compute(backbone.model, backbone, frames.images, device).numpy()
        save_atomically(file, lambda out: np.save(out, values))
    values = np.load(file)
    if not np.isfinite(values).all():
        raise ValueError(f"{backbone.name} ({backbone.spec}): its features are not finite; the checkpoint is broken")
    return values


def save_atomically(file: Path, write: Callable):
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    with open(partial, "wb") as out:
        write(out)
    os.replace(partial, file)


# ------------------------------------------------------------------------------------------------ frozen features


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, classes: int, k: int = 20) -> np.ndarray:
    """Share of each class among the k training frames of highest cosine similarity, float (M, classes)."""
    if len(train) < k:
        raise TaskError(f"kNN needs at least {k} training frames, there are {len(train)}; use a larger label fraction")
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, labels)
    return _columns(model.predict_proba(test), model.classes_, classes)


def linear(
    train: np.ndarray, labels: np.ndarray, groups: np.ndarray, test: np.ndarray, classes: int, seed: int
) -> np.ndarray:
    """Logistic regression on standardised features, float (M, classes).

    C in 1e-4 .. 1e2 is the best macro-F1 of 3 folds by group within the training frames; with a class in fewer than
    2 training groups there is nothing to choose on, and C is 1e-2.
    """
    smallest = min(len(set(groups[labels == c])) for c in range(classes))
    search = {"Cs": [1e-2], "cv": [(np.arange(len(labels)),) * 2]}
    if smallest >= 2:
        splitter = StratifiedGroupKFold(min(3, smallest), shuffle=True, random_state=seed)
        search = {"Cs": np.logspace(-4, 2, 7), "cv": list(splitter.split(train, labels, groups))}
    model = LogisticRegressionCV(
        **search, scoring=_macro_f1, max_iter=300, use_legacy_attributes=False, l1_ratios=(0.0,)
    )
    with warnings.catch_warnings():  # a weakly regularised candidate that has not converged may still be compared
        warnings.simplefilter("ignore", ConvergenceWarning)
        pipeline = make_pipeline(StandardScaler(), model).fit(train, labels)
    return _columns(pipeline.predict_proba(test), pipeline.classes_, classes)


def _macro_f1(model, x, y) -> float:
    return f1_score(y, model.predict(x), average="macro")


def _columns(probabilities: np.ndarray, present: np.ndarray, classes: int) -> np.ndarray:
    result = np.zeros((len(probabilities), classes))
    result[:, present] = probabilities
    return result


# --------------------------------------------------------------------------------------------------- fine-tuning


def last_block(model: nn.Module) -> tuple[nn.Module, Callable]:
    """The last block of a timm model without classifier, and what follows it up to the pooled features."""
    if hasattr(model, "layer4"):  # ResNets
        return model.layer4[-1], model.forward_head
    if hasattr(model, "stages") and hasattr(model, "norm_pre"):  # ConvNeXt
        return model.stages[-1].blocks[-1], lambda x: model.forward_head(model.norm_pre(x))
    if isinstance(getattr(model, "blocks", None), nn.Sequential) and hasattr(model, "norm"):  # vision transformers
        return model.blocks[-1], lambda x: model.forward_head(model.norm(x))
    raise ValueError(
        f"the last block of a {type(model).__name__} is not known here; leave 'finetune_last' out of "
        "--protocols (ResNets, ConvNeXt and vision transformers have it)"
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


class _Tail(nn.Module):
    def __init__(self, model: nn.Module, classes: int):
        super().__init__()
        model = copy.deepcopy(model)
        self.block, self.after = last_block(model)
        self.head = nn.Linear(model.num_features, classes)

    def forward(self, x):
        return self.head(self.after(self.block(x)))


class _Whole(nn.Module):
    def __init__(self, model: nn.Module, classes: int):
        super().__init__()
        self.model, self.head = copy.deepcopy(model), nn.Linear(model.num_features, classes)

    def forward(self, x):
        return self.head(self.model(x))


def finetune(
    model: nn.Module,
    train: torch.Tensor,
    labels: np.ndarray,
    test: torch.Tensor,
    recipe: FineTune,
    seed: int,
    device: str,
) -> np.ndarray:
    """Train all parameters of `model` (inputs to logits) and return the last epoch's probabilities of `test`."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.to(device).train()
        optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr)
        target = torch.from_numpy(labels).long()
        for _ in range(recipe.epochs):
            for index in torch.randperm(len(train), generator=generator).split(recipe.batch):
                if len(index) == 1:  # batch normalisation has no statistics of one frame
                    continue
                x = train[index].to(device)
                if recipe.flip and torch.rand((), generator=generator) < 0.5:
                    x = x.flip(-1)
                loss = F.cross_entropy(model(x), target[index].to(device))
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
        model.eval()
        with torch.inference_mode():
            logits = torch.cat([model(x.to(device)).double().cpu() for x in test.split(256)])
    if not torch.isfinite(logits).all():
        raise FloatingPointError(f"fine-tuning diverged (lr {recipe.lr}): lower its learning rate")
    return logits.softmax(1).numpy()


# ------------------------------------------------------------------------------------------------ out-of-fold runs


def out_of_fold(
    protocol: str,
    inputs,
    labels: np.ndarray,
    groups: np.ndarray,
    folds: np.ndarray,
    item: np.ndarray,
    classes: int,
    fraction: float,
    seed: int,
    backbone: Backbone,
    recipe: FineTune | None,
    device: str,
    done: Callable = lambda: None,
) -> np.ndarray:
    """Class probabilities of every frame, each from a model that has seen neither its group nor its fold.

    inputs: features (N, d) for frozen protocols, activations before the last block for finetune_last, images
    (N, px, px) uint8 for finetune_full. labels, groups, folds: of the items; item: int (N,), each frame's item.
    fraction: share of the groups of each class that keep their label in the training part. done: called after each fold. Returns float (N, classes).
    """
    result = np.full((len(item), classes), np.nan)
    for fold in range(folds.max() + 1):
        training = np.flatnonzero(folds != fold)
        training = training[label_subset(labels[training], groups[training], fraction, seed)]
        train, test = np.flatnonzero(np.isin(item, training)), np.flatnonzero(folds[item] == fold)
        y, g = labels[item[train]], groups[item[train]]
        assert not set(g) & set(groups[item[test]])
        if len(set(y)) < classes:
            raise TaskError(f"fold {fold}: {fraction:.0%} of the labels leave a class without a training item")
        if protocol == "knn":
            result[test] = knn(inputs[train], y, inputs[test], classes)
        elif protocol == "linear":
            result[test] = linear(inputs[train], y, g, inputs[test], classes, seed)
        elif protocol == "finetune_last":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _Tail(backbone.model, classes)
            result[test] = finetune(model, inputs[train], y, inputs[test], recipe, seed, device)
        elif protocol == "finetune_full":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = _Whole(backbone.model, classes)
            result[test] = finetune(
                model, to_input(inputs[train], backbone), y, to_input(inputs[test], backbone), recipe, seed, device
            )
        else:
            raise ValueError(f"no protocol {protocol!r}: choose from {', '.join(PROTOCOLS)}")
        done()
    return result


def pool_frames(probabilities: np.ndarray, item: np.ndarray, items: int) -> np.ndarray:
    """Mean probability of each item's frames, float (items, classes)."""
    total = np.zeros((items, probabilities.shape[1]))
    np.add.at(total, item, probabilities)
    return total / np.bincount(item, minlength=items)[:, None]
