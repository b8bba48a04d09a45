"""The rows of results.json: every task with every backbone, protocol, share of labels and level."""

import functools
from collections import defaultdict
from pathlib import Path

import numpy as np
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix
from tqdm import tqdm

from training.evaluation import intervals, metrics, protocols, segmentation
from training.evaluation.backbones import load_backbone, split_name
from training.evaluation.coco import average_precision
from training.evaluation.features import cached_features
from training.evaluation.fine_tuning import before_last_block
from training.evaluation.folds import task_folds
from training.evaluation.frames import load_frames
from training.evaluation.lesions import image_metrics, load_lesions
from training.evaluation.tables import labels_kept
from training.evaluation.task import Task, check_excluded

SHOWN = 6  # segmentation overlays in the report


def rows(config, task: Task, spec: str, px: int, device: str, arrays: dict):
    """Yields (row of results.json, its Estimates) of a task and backbone; what plots need goes into `arrays`.

    config: evaluate.py's settings. spec: one of its backbones, with inputs of px pixels.
    """
    kind = segmentation_rows if task.kind == "segmentation" else prediction_rows
    yield from kind(config, task, spec, px, device, arrays)


def prediction_rows(config, task: Task, spec: str, px: int, device: str, arrays: dict):
    """Of everything but segmentation: for every protocol, share of labels and level."""
    frames = load_frames(task, px, Path(config.cache), config.rate, config.crop, config.workers)
    check_excluded(task, config.max_excluded)
    cells = []
    for seed in config.seeds:
        folds = task_folds(task, config.folds, seed)
        cells.append(
            protocols.Cell(task, frames, folds, load_backbone(spec, seed, px), seed, device, Path(config.cache))
        )
    name, collected = split_name(spec)[0], defaultdict(list)
    for cell in cells:
        for key, scores in _of_seed(config, cell, name, arrays):
            collected[key].append(scores)
    arrays[f"labels/{task.name}"] = task.targets[cells[0].folds >= 0]
    for (protocol, fraction), scores in collected.items():
        yield from _levels(config, cells[0], name, (protocol, fraction), scores, arrays)


def _cells(config, task: Task, data, spec: str, px: int, device: str) -> list[protocols.Cell]:
    """One each seed."""
    cells = []
    for seed in config.seeds:
        folds, backbone = task_folds(task, config.folds, seed), load_backbone(spec, seed, px)
        cells.append(protocols.Cell(task, data, folds, backbone, seed, device, Path(config.cache)))
    return cells


def _of_seed(config, cell: protocols.Cell, name: str, arrays: dict):
    """Yields ((protocol, fraction), predictions of every frame) of one seed."""
    task, frames, backbone, device = cell.task, cell.data, cell.backbone, cell.device
    features = cached_features(backbone, frames, cell.cache, device)
    if cell.seed == config.seeds[0]:
        pooled = protocols.pool_frames(features, frames.item, len(task.items))
        arrays[f"tsne/{task.name}/{name}"] = tsne(pooled[cell.folds >= 0])
    inputs = {
        "finetune_last": functools.cache(lambda: before_last_block(backbone, frames.images, device)),
        "finetune_full": lambda: frames.images,
    }
    for protocol in config.protocols:
        recipe = {"finetune_last": config.last, "finetune_full": config.full}.get(protocol)
        own = inputs.get(protocol, lambda: features)
        for fraction in config.fractions:
            count = int(cell.folds.max()) + 1
            with tqdm(total=count, desc=f"{task.name} {name} {protocol} {labels_kept(fraction)} {cell.seed}") as bar:
                scores = protocols.scores_out_of_fold(cell, protocol, own, fraction, recipe, bar.update)
            yield (protocol, fraction), scores


def _levels(config, cell: protocols.Cell, name: str, key: tuple[str, float], scores: list[np.ndarray], arrays: dict):
    """Yields a row for the items, and one for their frames where there are several. scores: of each seed."""
    task, item, (protocol, fraction) = cell.task, cell.data.item, key
    tested = np.flatnonzero(cell.folds >= 0)
    pooled = [protocols.pool_frames(s, item, len(task.items))[tested] for s in scores]
    levels = {"video" if task.has_video else "image": (pooled, tested)}
    if task.has_video:
        kept = np.isin(item, tested)
        levels["frame"] = [s[kept] for s in scores], item[kept]
    arrays[f"scores/{task.name}/{name}/{protocol}/{fraction:g}"] = np.concatenate(pooled).astype(np.float32)
    for level, (found, index) in levels.items():
        targets, groups = task.targets[index], task.groups[index]
        s, y = np.concatenate(found), np.concatenate([targets] * len(found))
        g = np.tile(groups, len(found))
        estimates = metrics.estimates(task.kind, y, s, g, task.classes, config.draws)
        more = {}
        if task.kind == "classification":
            more = {"confusion": confusion_matrix(y, s.argmax(1), labels=range(len(task.classes))).tolist()}
        yield _row(task, name, (protocol, fraction, level), len(index), estimates) | more, estimates


def segmentation_rows(config, task: Task, spec: str, px: int, device: str, arrays: dict):
    """Of segmentation: for every head and share of labels."""
    name = split_name(spec)[0]
    lesions = load_lesions(task, config.segment.px, Path(config.cache))
    check_excluded(task, config.max_excluded)
    cells = _cells(config, task, lesions, spec, px, device)
    for head in config.segment.heads:
        for fraction in config.fractions:
            yield _segmented(config, cells, name, (head, fraction), arrays)


def _segmented(config, cells: list[protocols.Cell], name: str, key: tuple[str, float], arrays: dict):
    (head, fraction), task, lesions = key, cells[0].task, cells[0].data
    tested = np.flatnonzero(cells[0].folds >= 0)
    shown = tested[np.linspace(0, len(tested) - 1, SHOWN).round().astype(int)]
    predicted, instances = [], []
    for cell in cells:
        about = f"{task.name} {name} {head} {labels_kept(fraction)} {cell.seed}"
        with tqdm(total=int(cell.folds.max()) + 1, desc=about) as bar:
            mask, found = segmentation.masks_out_of_fold(cell, head, fraction, config.segment, bar.update)
        predicted.append(mask)
        instances += [found[i] for i in tested]
    stack = [lesions.images[shown], *(255 * mask[shown].astype(np.uint8) for mask in (lesions.masks, predicted[0]))]
    arrays[f"overlay/{task.name}/{name}/{head}/{fraction:g}"] = np.stack(stack, axis=1)
    index = np.tile(tested, len(cells))
    groups = task.groups[index]
    values = image_metrics(np.concatenate([mask[tested] for mask in predicted]), lesions[index])
    estimates = intervals.mean_of_rows(values, groups, config.draws)
    if head == "maskrcnn":
        estimates |= average_precision(lesions.masks[index], instances, groups, config.draws)
    return _row(task, name, (head, fraction, "image"), len(tested), estimates), estimates


def _row(task: Task, backbone: str, kind: tuple[str, float, str], n: int, estimates: dict) -> dict:
    """kind: protocol, fraction, level."""
    keys = dict(zip(("protocol", "fraction", "level"), kind))
    groups = {item.group for item in task.tested}
    counts = {"n": n, "groups": len(groups), "found": task.found, "excluded": len(task.excluded)}
    found = {key: e.to_dict() for key, e in estimates.items()}
    return {"task": task.name, "backbone": backbone, **keys, **counts, "metrics": found}


def tsne(x: np.ndarray) -> np.ndarray:
    """t-SNE of the items' mean features, float32 (items, 2)."""
    model = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="random", random_state=0)
    return model.fit_transform(x).astype(np.float32)


def differences(found: list[tuple[dict, dict]]) -> list[dict]:
    """Every later backbone minus every earlier one, on the same folds and draws. found: of one task."""
    kinds, result = ("task", "protocol", "fraction", "level"), []
    for i, (first, earlier) in enumerate(found):
        for second, later in found[i + 1 :]:
            kind = {key: first[key] for key in kinds}
            if first["backbone"] == second["backbone"] or any(second[key] != kind[key] for key in kinds):
                continue
            for metric in earlier:
                d = later[metric] - earlier[metric]
                names = {"backbone": second["backbone"], "against": first["backbone"], "metric": metric}
                verdict = intervals.verdict(d, metrics.lower_is_better(metric))
                result.append({**kind, **names, **d.to_dict(), "verdict": verdict})
    return result


def describe(task: Task, config) -> dict:
    """What results.json says of a task."""
    about = {
        "title": task.title,
        "kind": task.kind,
        "classes": list(task.classes),
        "found": task.found,
        "used": len(task.items),
        **({"tested_once": len(task.external & {item.id for item in task.items})} if task.external else {}),
        **_by_class(task),
        "groups": len(set(task.groups)),
        "excluded": task.excluded,
        "notes": task.notes,
        "items": [[item.id, item.label, item.group, item.sha256, *item.values] for item in task.items],
        "folds": {s: task_folds(task, config.folds, s).tolist() for s in config.seeds},
    }
    if task.kind in ("multilabel", "regression"):
        facts = {"mean": np.mean, "min": np.min, "max": np.max}
        about["columns"] = {
            name: {fact: float(function(own)) for fact, function in facts.items()}
            for name, own in zip(task.classes, task.targets.T)
        }
    return about


def _by_class(task: Task) -> dict:
    """Files and groups of each class; none where there are no classes."""
    classes = enumerate(task.classes if task.kind in ("classification", "segmentation") else ())
    found = {name: np.flatnonzero(task.labels == i) for i, name in classes}
    return {
        "by_class": {name: len(index) for name, index in found.items()},
        "groups_by_class": {name: len(set(task.groups[index])) for name, index in found.items()},
    }
