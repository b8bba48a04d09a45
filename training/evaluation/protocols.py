"""How a backbone is judged: kNN, linear probe, fine-tuning the last block, fine-tuning everything.

Each protocol trains on the frames of some folds and predicts the frames of another: probabilities of the classes or
labels, or values. Choices (the regularisation) are made inside the training folds, by group; nothing looks at the test
fold.
"""

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from sklearn.compose import TransformedTargetRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold, StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from training.evaluation.backbones import Backbone
from training.evaluation.fine_tuning import FineTune, Tuning, finetune
from training.evaluation.folds import label_subset
from training.evaluation.frames import TaskFrames, cached
from training.evaluation.task import Task, TaskError

PROTOCOLS = ("knn", "linear", "finetune_last", "finetune_full")


def knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int = 20) -> np.ndarray:
    """Share of each class among the k training frames of highest cosine similarity, float (M, classes)."""
    _enough(train, k)
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(train, labels)
    return model.predict_proba(test)


def knn_values(train: np.ndarray, targets: np.ndarray, test: np.ndarray, k: int = 20) -> np.ndarray:
    """Mean target of the k training frames of highest cosine similarity, float (M, d). targets: float (N, d)."""
    _enough(train, k)
    return KNeighborsRegressor(k, metric="cosine", algorithm="brute").fit(train, targets).predict(test)


def _enough(train: np.ndarray, k: int):
    if len(train) < k:
        raise TaskError(f"kNN needs at least {k} training frames, there are {len(train)}; use a larger label fraction")


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


def linear_labels(
    train: np.ndarray, targets: np.ndarray, groups: np.ndarray, test: np.ndarray, seed: int
) -> np.ndarray:
    """A logistic regression each label, as `linear`: probabilities, float (M, labels). targets: 0 or 1, (N, labels).

    A label that no or every training frame has is predicted so.
    """
    columns = []
    for own in (targets > 0).T:
        if own.all() or not own.any():
            columns.append(np.full(len(test), float(own[0])))
        else:
            columns.append(linear(train, own.astype(int), groups, test, seed)[:, 1])
    return np.stack(columns, axis=1)


def linear_values(train: np.ndarray, targets: np.ndarray, groups: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Ridge regression on standardised features, float (M, d). targets: float (N, d).

    Targets are standardised, too: columns of any unit count alike. alpha in 1 ... 1e6 has the least squared error in 3
    folds by group within the training frames; of one group, it is 1e3.
    """
    model, kwargs = make_pipeline(StandardScaler(), Ridge(1e3)), {}
    if (several := len(set(groups))) > 1:
        alphas = {"ridge__alpha": np.logspace(0, 6, 7)}
        model = GridSearchCV(model, alphas, scoring="neg_mean_squared_error", cv=GroupKFold(min(3, several)))
        kwargs = {"groups": groups}
    model = TransformedTargetRegressor(model, transformer=StandardScaler())
    with threadpool_limits(1, "blas"):
        return model.fit(train, targets, **kwargs).predict(test).reshape(len(test), -1)


# ------------------------------------------------------------------------------------------------ out-of-fold runs


@dataclass(frozen=True)
class Cell:
    """What the runs of a backbone on a task with one seed share. folds: int (items,), -1: never tested, as the
    training part of an external test. data: the task's frames, or for segmentation its images and masks. cache: folder
    of finished folds."""

    task: Task
    data: TaskFrames
    folds: np.ndarray
    backbone: Backbone
    seed: int
    device: str
    cache: Path


def scores_out_of_fold(
    cell: Cell,
    protocol: str,
    inputs: Callable[[], np.ndarray | torch.Tensor],
    fraction: float,
    recipe: FineTune | None = None,
    done: Callable = lambda: None,
) -> np.ndarray:
    """Predictions of every frame, each from a model that has seen neither its group nor its fold.

    inputs: gives, for every frame, features (N, d) for frozen protocols, activations before the last block for
    finetune_last, uint8 images (N, px, px) for finetune_full. fraction: share of the groups of each class that keep
    their label in the training part, or above 1 a number of items. Finished folds are kept; done: called after each.
    Returns float (N, classes), nan for frames that are never tested.
    """
    task, item, folds, backbone = cell.task, cell.data.item, cell.folds, cell.backbone
    targets, groups, outputs = task.targets, task.groups, len(task.classes)
    result = np.full((len(item), outputs), np.nan)
    described = ["fold", *backbone.key, cell.data.key, targets.tolist(), folds.tolist(), groups.tolist()]
    described += [protocol, fraction, cell.seed, recipe and asdict(recipe)]
    described += [task.kind] if task.kind != "classification" else []
    for fold in range(folds.max() + 1):
        training = training_items(task, folds, fold, fraction, cell.seed)
        train, test = np.flatnonzero(np.isin(item, training)), np.flatnonzero(folds[item] == fold)
        y, g = targets[item[train]], groups[item[train]]
        assert not set(g) & set(groups[item[test]])
        if task.kind == "classification" and len(set(y)) < outputs:
            kept = f"{fraction:.0%} of the labels leave" if fraction <= 1 else f"{fraction:g} labels leave"
            raise TaskError(f"fold {fold}: {kept} a class without a training item")

        def make():
            x = inputs()
            if protocol in ("knn", "linear"):
                return {"scores": frozen(protocol, task.kind, (x[train], y, g), x[test], cell.seed)}
            last = protocol == "finetune_last"
            tuning = Tuning(last, recipe, outputs, cell.seed, cell.device, task.kind)
            return {"scores": finetune(backbone, tuning, x[train], y, x[test])}

        result[test] = cached(cell.cache, [*described, fold], make)["scores"]
        done()
    return result


def training_items(task: Task, folds: np.ndarray, fold: int, fraction: float, seed: int) -> np.ndarray:
    """Indices of the items that a fold's model is trained on."""
    training = np.flatnonzero(folds != fold)
    return training[label_subset(task.strata[training], task.groups[training], fraction, seed)]


def frozen(protocol: str, kind: str, known: tuple, test: np.ndarray, seed: int) -> np.ndarray:
    """Predictions of features `test`, float (M, outputs). known: features, targets and groups to learn from."""
    train, targets, groups = known
    if protocol == "knn":
        return (knn if kind == "classification" else knn_values)(train, targets, test)
    if kind == "regression":
        return linear_values(train, targets, groups, test)
    return (linear if kind == "classification" else linear_labels)(train, targets, groups, test, seed)


def pool_frames(values: np.ndarray, item: np.ndarray, items: int) -> np.ndarray:
    """Mean over each item's frames, float (items, d). values: (N, d); item: int (N,)."""
    total = np.zeros((items, values.shape[1]))
    np.add.at(total, item, values)
    return total / np.bincount(item, minlength=items)[:, None]
