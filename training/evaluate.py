"""Judge backbones on real tasks: `python training/evaluate.py [--config FILE.yaml] [--dotted.override VALUE ...]`.

Decode once -> folds by group -> features once -> kNN, linear probe, fine-tuning, segmentation -> intervals over groups,
paired differences -> results.json, report.md, plots, report.html; with --model-card also its tables. Every finished
fold is cached: an interrupted run, started again, goes on where it stopped.
"""

import datetime
import functools
import os
import platform
import shlex
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import sklearn  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402
from sklearn.manifold import TSNE  # noqa: E402
from sklearn.metrics import confusion_matrix  # noqa: E402
from tqdm import tqdm  # noqa: E402

from training import config as configs  # noqa: E402
from training.engine import export  # noqa: E402
from training.evaluation import (
    datasets,  # noqa: E402
    intervals,  # noqa: E402
    protocols,  # noqa: E402
    report,  # noqa: E402
    segmentation,  # noqa: E402
)
from training.evaluation.backbones import (  # noqa: E402
    find_leaks,
    is_imagenet,
    is_random,
    load_backbone,
    refuse_leaks,
    split_name,
    split_px,
)
from training.evaluation.datasets import EvaluationError, Task  # noqa: E402
from training.evaluation.protocols import FineTune  # noqa: E402
from training.evaluation.segmentation import Segment  # noqa: E402
from training.messages import command, without_folders  # noqa: E402
from uscl_hub import files  # noqa: E402
from uscl_hub.checkpoints import sha256  # noqa: E402

DATA = Path(os.environ.get("USCL_DATA", "data"))
SHOWN = 6  # segmentation overlays in the report


@dataclass
class Config:
    """Evaluate backbones on downstream ultrasound tasks."""

    backbones: tuple[str, ...] = ("random:resnet18",)
    """random:NAME, timm:NAME (random too), timm:NAME:pretrained, imagenet (EfficientNet-Lite0; extra [imagenet]) or
    imagenet:lite1, imagenet:lite2, meta_uscl_NAME[.tag], or an exported or converted folder, where '{seed}' stands for
    each seed; 'label=' before it names it in the report, '@PX' after it gives it an input size of its own
    (imagenet@224). Differences are from the first one."""
    tasks: tuple[str, ...] = ("pocus", "busi", "busi3", "blues")
    """pocus (3 classes, by patient), busi (benign / malignant), busi3, blues (COVID-BLUES severity), blues_point (scan
    points of its clips: for tuning), busi_seg, bus_uc (breast, benign / malignant), ovary (8 classes)."""
    protocols: tuple[str, ...] = ("knn", "linear")
    """knn, linear, finetune_last, finetune_full; busi_seg is trained with segment.heads instead."""
    fractions: tuple[float, ...] = (1.0,)
    """Shares of the training groups that keep their label, such as 0.1 0.25 1."""
    seeds: tuple[int, ...] = (0,)
    """Each seed makes its own folds, random weights and order; all are pooled."""
    folds: int = 5
    """Folds by group."""
    data: str = str(DATA / "classification")
    """Folder that holds pocus_lung, busi, bus_uc and ovary; default: $USCL_DATA/classification."""
    blues: str = str(DATA / "pretrain" / "covid_blues")
    """COVID-BLUES, with severity.csv."""
    out: str = "runs/evaluate"
    """results.json, report.md, report.html, figures/, arrays.npz."""
    cache: str = "runs/evaluate_cache"
    """Decoded frames, features and finished folds; runs may share it."""
    model_card: str = ""
    """A MODEL_CARD.md whose tables, between the markers, are to be replaced."""
    section: str = ""
    """Which markers: NAME for <!-- results:NAME:begin --> and end; '': <!-- results:begin -->."""
    compare: tuple[str, ...] = ()
    """Names of the backbones from which the report shows the differences of those after them; (): the first one."""
    px: int = 0
    """Side of the input; 0: each backbone's own; untrained ones, and then imagenet, that of the first trained one, else
    64. A size after '@' comes first. busi_seg takes segment.px for all of them."""
    rate: float = 3.0
    """Frames per second taken of a video."""
    crop: str = "none"
    """'crop' or 'blank' uses the detected moving region only."""
    max_excluded: float = 0.05
    """A task with a larger share of unusable files does not run."""
    leaks: str = "refuse"
    """If a backbone was pretrained on a task's groups: 'refuse' ends the run, 'skip' leaves out that pair, said so."""
    draws: int = 1000
    """Bootstrap draws."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    workers: int = 0
    """Threads that decode; 0: one a core."""
    last: FineTune = field(default_factory=lambda: FineTune(epochs=30, lr=0.01, batch=128))
    """The paper's 'last_three': the last block and the head."""
    full: FineTune = field(default_factory=lambda: FineTune(epochs=10, lr=1e-3, batch=64))
    """Fine-tuning of everything."""
    segment: Segment = field(default_factory=Segment)
    """Lesion segmentation (task busi_seg)."""


def main(config: Config) -> Path:
    """Run everything and return the output folder. Raises UserError."""
    started = time.time()
    check(config)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    out = Path(config.out)
    loaded = {name: datasets.load_task(name, Path(config.data), Path(config.blues)) for name in config.tasks}
    for task in loaded.values():
        datasets.check_excluded(task, config.max_excluded)
    px = input_sizes(config)
    backbones, refused = inspect(config, px, loaded.values())
    out.mkdir(parents=True, exist_ok=True)
    configs.dump(config, out / "config.yaml")
    result = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *without_folders(sys.argv)]),
        "config": without_folders(asdict(config)),
        "environment": environment(device),
        "backbones": backbones,
        "tasks": {},
        "refused": [{"backbone": name, "task": task, "groups": n} for (name, task), n in refused.items()],
        "results": [],
        "differences": [],
    }
    arrays = {}
    for task in loaded.values():
        found = []
        for spec in config.backbones:
            if (split_name(spec)[0], task.name) not in refused:
                rows = segmentation_rows if task.name == "busi_seg" else classification_rows
                found += rows(config, task, spec, px[spec], device, arrays)
        result["results"] += [row for row, _ in found]
        result["differences"] += differences(found)
        result["tasks"][task.name] = describe(task, config)
    result["seconds"] = round(time.time() - started, 1)
    files.write_whole(out / "arrays.npz", functools.partial(np.savez_compressed, **arrays))
    files.write_json(out / "results.json", result)
    report.write(out)
    if config.model_card:
        report.update_model_card(Path(config.model_card), result, config.section)
    print(report.markdown_tables(result))
    print(f"{out / 'report.html'} written, {result['seconds']:.0f} s")
    return out


def check(config: Config):
    """Refuse settings that cannot work before anything is decoded."""
    for given, known, what in (
        (config.tasks, datasets.NAMES, "tasks"),
        (config.protocols, protocols.PROTOCOLS, "protocols"),
        ((config.leaks,), ("refuse", "skip"), "leaks"),
        ((config.crop,), ("none", "crop", "blank"), "crop"),
        ((config.device,), ("auto", "cpu", "cuda"), "device"),
        (config.segment.heads, segmentation.HEADS, "segment.heads"),
    ):
        for name in given:
            if name not in known:
                raise EvaluationError(f"{what}: no {name!r}; choose from {', '.join(known)}")
    for name in ("backbones", "tasks", "seeds", "fractions"):
        if not getattr(config, name):
            raise EvaluationError(f"{name}: give at least one")
    names = [split_name(spec)[0] for spec in config.backbones]
    if len(set(names)) < len(names):
        raise EvaluationError(f"backbones: {', '.join(names)} are not all different; name one, as in 'ours=FOLDER'")
    if unknown := set(config.compare) - set(names):
        raise EvaluationError(f"compare: {', '.join(sorted(unknown))} is not among the backbones {', '.join(names)}")
    if config.folds < 2 or config.draws < 1 or config.rate <= 0 or any(not 0 < f <= 1 for f in config.fractions):
        raise EvaluationError("folds must be at least 2, draws at least 1, rate above 0 and fractions in (0, 1]")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("device: torch sees no CUDA device here; leave --device at 'auto'")


def input_sizes(config: Config) -> dict[str, int]:
    """Side of every backbone's input; Config.px says by which rule."""
    given = {spec: px for spec in config.backbones if (px := split_px(spec)[1])}
    if config.px:
        return {spec: given.get(spec, config.px) for spec in config.backbones}
    rest = [spec for spec in config.backbones if spec not in given and not is_random(spec)]
    own = {spec: load_backbone(spec, config.seeds[0]).px for spec in rest}
    ours = [px for spec, px in own.items() if not is_imagenet(spec)]
    first = next(iter(ours or own.values()), 64)
    return {
        spec: given.get(spec) or (first if is_random(spec) or is_imagenet(spec) else own[spec])
        for spec in config.backbones
    }


def inspect(config: Config, px: dict[str, int], loaded) -> tuple[dict, dict]:
    """What every backbone is, and how many groups of which (backbone, task) it must not be tested on."""
    backbones, refused = {}, {}
    for spec in config.backbones:
        for seed in config.seeds:
            backbone = load_backbone(spec, seed, px[spec])
            known = backbone.provenance or {}
            about = backbones.setdefault(
                backbone.name,
                {
                    "spec": without_folders(split_name(spec)[1]),
                    "architecture": backbone.architecture,
                    "px": backbone.px,
                    "sha": [],
                    "untrained": is_random(spec),
                    "leaks_checked": bool(known.get("groups") or known.get("clips")),
                    "provenance": without_folders({k: v for k, v in known.items() if k not in ("groups", "clips")}),
                },
            )
            if backbone.sha not in about["sha"]:
                about["sha"].append(backbone.sha)
            for task in loaded:
                if config.leaks == "refuse":
                    refuse_leaks(backbone, task)
                elif leaked := find_leaks(backbone, task):
                    refused[backbone.name, task.name] = len(leaked)
    return backbones, refused


def environment(device: str) -> dict:
    libraries = {"torch": torch, "torchvision": torchvision, "timm": timm, "scikit-learn": sklearn}
    versions = {name: module.__version__ for name, module in libraries.items()}
    return {**export.code_version(), "python": platform.python_version(), **versions, "device": device}


def classification_rows(config: Config, task: Task, spec: str, px: int, device: str, arrays: dict):
    """Yields (row of results.json, its Estimates) for every protocol, label fraction and level."""
    cache = Path(config.cache)
    frames = datasets.load_frames(task, px, cache, config.rate, config.crop, config.workers, config.max_excluded)
    labels, groups, name, collected = task.labels, task.groups, split_name(spec)[0], defaultdict(list)
    for seed in config.seeds:
        folds = datasets.make_folds(labels, groups, task.classes, config.folds, seed, task.title)
        backbone = load_backbone(spec, seed, px)
        features = protocols.features(backbone, frames, cache, device)
        if seed == config.seeds[0]:
            arrays[f"tsne/{task.name}/{name}"] = tsne(protocols.pool_frames(features, frames.item, len(task.items)))
        inputs = {
            "finetune_last": functools.cache(lambda: protocols.before_last_block(backbone, frames.images, device)),
            "finetune_full": lambda: frames.images,
        }
        for protocol in config.protocols:
            recipe = {"finetune_last": config.last, "finetune_full": config.full}.get(protocol)
            for fraction in config.fractions:
                with tqdm(total=config.folds, desc=f"{task.name} {name} {protocol} {fraction:.0%} {seed}") as bar:
                    args = task, frames, folds, fraction, seed, backbone, recipe, device, cache, bar.update
                    scores = protocols.out_of_fold(protocol, inputs.get(protocol, lambda: features), *args)
                collected[protocol, fraction].append(scores)
    arrays[f"labels/{task.name}"] = labels
    for (protocol, fraction), scores in collected.items():
        pooled = [protocols.pool_frames(s, frames.item, len(task.items)) for s in scores]
        levels = {"video" if task.has_video else "image": (pooled, np.arange(len(task.items)))}
        if task.has_video:
            levels["frame"] = scores, frames.item
        arrays[f"scores/{task.name}/{name}/{protocol}/{fraction:g}"] = np.concatenate(pooled).astype(np.float32)
        for level, (s, item) in levels.items():
            s, y, g = np.concatenate(s), np.tile(labels[item], len(s)), np.tile(groups[item], len(s))
            estimates = intervals.classification(y, s, g, task.classes, config.draws)
            confusion = confusion_matrix(y, s.argmax(1), labels=range(len(task.classes))).tolist()
            yield row(task, name, protocol, fraction, level, len(item), estimates, confusion=confusion), estimates


def segmentation_rows(config: Config, task: Task, spec: str, px: int, device: str, arrays: dict):
    """Yields (row of results.json, its Estimates) for every head and label fraction."""
    cache, name = Path(config.cache), split_name(spec)[0]
    images, masks = segmentation.load_pairs(task, config.segment.px, cache)
    datasets.check_excluded(task, config.max_excluded)
    shown = np.linspace(0, len(images) - 1, SHOWN).round().astype(int)
    for head in config.segment.heads:
        for fraction in config.fractions:
            predicted, instances = [], []
            for seed in config.seeds:
                folds = datasets.make_folds(task.labels, task.groups, task.classes, config.folds, seed, task.title)
                backbone = load_backbone(spec, seed, px)
                with tqdm(total=config.folds, desc=f"{task.name} {name} {head} {fraction:.0%} {seed}") as bar:
                    args = task, folds, fraction, seed, config.segment, device, cache, bar.update
                    masks_of_seed, found = segmentation.out_of_fold(head, backbone, images, masks, *args)
                predicted.append(masks_of_seed)
                instances += found
            overlay = [images[shown], masks[shown] * np.uint8(255), predicted[0][shown] * np.uint8(255)]
            arrays[f"overlay/{task.name}/{name}/{head}/{fraction:g}"] = np.stack(overlay, axis=1)
            truth, groups = np.tile(masks, (len(config.seeds), 1, 1)), np.tile(task.groups, len(config.seeds))
            values = segmentation.image_metrics(np.concatenate(predicted), truth)
            estimates = intervals.mean_of_rows(values, groups, config.draws)
            if head == "maskrcnn":
                estimates |= segmentation.average_precision(truth, instances, groups, config.draws)
            yield row(task, name, head, fraction, "image", len(images), estimates), estimates


def row(task: Task, backbone: str, protocol: str, fraction: float, level: str, n: int, estimates: dict, **more) -> dict:
    counts = {"n": n, "groups": len(set(task.groups)), "found": task.found, "excluded": len(task.excluded)}
    metrics = {key: e.to_dict() for key, e in estimates.items()}
    kind = {"task": task.name, "backbone": backbone, "protocol": protocol, "fraction": fraction, "level": level}
    return {**kind, **counts, "metrics": metrics, **more}


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
                result.append({**kind, **names, **d.to_dict(), "verdict": intervals.verdict(d)})
    return result


def describe(task: Task, config: Config) -> dict:
    labels, groups = task.labels, task.groups
    folds = {s: datasets.make_folds(labels, groups, task.classes, config.folds, s).tolist() for s in config.seeds}
    return {
        "title": task.title,
        "classes": list(task.classes),
        "found": task.found,
        "used": len(task.items),
        "by_class": {c: int((labels == i).sum()) for i, c in enumerate(task.classes)},
        "groups": len(set(groups)),
        "groups_by_class": {c: len(set(groups[labels == i])) for i, c in enumerate(task.classes)},
        "excluded": task.excluded,
        "notes": task.notes,
        "items": [[item.id, item.label, item.group, sha256(item.path)] for item in task.items],
        "folds": folds,
    }


if __name__ == "__main__":
    settings = configs.cli(Config, __doc__)
    command(lambda: main(settings) and None, prefix="evaluate.py: ")
