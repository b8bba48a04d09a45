"""Judge backbones on real tasks: `python training/evaluate.py [--config FILE.yaml] [--dotted.override VALUE ...]`.

Decode once -> folds by group -> features once -> kNN, linear probe, fine-tuning, segmentation -> intervals over groups,
paired differences -> results.json, report.md, plots, report.html; with --model-card also its tables. Every finished
cell is cached: an interrupted run, started again, goes on where it stopped.
"""

import datetime
import hashlib
import json
import platform
import shlex
import subprocess
import sys
import time
import warnings
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
from training import intervals, protocols, report, segment, tasks  # noqa: E402
from training.backbones import LeakError, find_leaks, is_random, load_backbone, refuse_leaks, split_name  # noqa: E402
from training.protocols import FineTune  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def _full() -> FineTune:
    return FineTune(epochs=10, lr=1e-3, batch=64, flip=True)


@dataclass
class Config:
    """Evaluate backbones on downstream ultrasound tasks."""

    backbones: tuple[str, ...] = ("random:resnet18",)
    """random:NAME, timm:NAME[:pretrained], meta_uscl_NAME[.tag], or a folder (exported or converted); 'label=' before
    it names it in the report. The first one is the reference of the differences."""
    tasks: tuple[str, ...] = ("pocus", "busi", "busi3", "blues")
    """pocus (3 classes, by patient), busi (benign / malignant), busi3, blues (COVID-BLUES severity), busi_seg."""
    protocols: tuple[str, ...] = ("knn", "linear")
    """knn, linear, finetune_last, finetune_full; busi_seg is trained with segment.heads instead."""
    fractions: tuple[float, ...] = (1.0,)
    """Shares of the training groups that keep their label, such as 0.1 0.25 1."""
    seeds: tuple[int, ...] = (0,)
    """Each seed makes its own folds, random weights and order; all are pooled."""
    folds: int = 5
    """Folds by group."""
    data: str = str(DATA / "classification")
    """Folder that holds pocus_lung and busi."""
    blues: str = str(DATA / "pretrain" / "covid_blues")
    """COVID-BLUES, with severity.csv."""
    out: str = "runs/evaluate"
    """results.json, report.md, report.html, figures/, arrays.npz."""
    cache: str = "runs/evaluate_cache"
    """Decoded frames, features and finished cells; may be shared between runs."""
    model_card: str = ""
    """A MODEL_CARD.md whose tables, between the markers, are to be replaced."""
    px: int = 0
    """Side of the input; 0: each backbone's own, untrained ones that of the first trained one, else 64."""
    rate: float = 3.0
    """Frames per second taken of a video."""
    crop: str = "none"
    """'crop' or 'blank' uses the detected moving region only."""
    max_excluded: float = 0.05
    """A task with a larger share of unusable files does not run."""
    leaks: str = "refuse"
    """'refuse': end the run if a backbone was pretrained on a task's groups; 'skip': leave out that pair, and say so."""
    draws: int = 1000
    """Bootstrap draws."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    workers: int = 0
    """Processes that decode; 0: one a core."""
    last: FineTune = field(default_factory=lambda: FineTune(epochs=30, lr=0.01, batch=128, flip=False))
    """The paper's 'last_three': the last block and the head."""
    full: FineTune = field(default_factory=_full)
    """Fine-tuning of everything."""
    segment: segment.Segment = field(default_factory=segment.Segment)
    """Lesion segmentation (task busi_seg)."""


def main(config: Config) -> Path:
    """Run everything and return the output folder."""
    started = time.time()
    check(config)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    out, cache = Path(config.out), Path(config.cache)
    out.mkdir(parents=True, exist_ok=True)
    configs.dump(config, out / "config.yaml")
    loaded = {name: tasks.load_task(name, Path(config.data), Path(config.blues)) for name in config.tasks}
    for task in loaded.values():
        tasks.check_excluded(task, config.max_excluded)
    px = input_sizes(config)
    backbones, refused = {}, []
    for spec in config.backbones:
        backbone = load_backbone(spec, config.seeds[0], px[spec])
        backbones[spec] = backbone
        for task in loaded.values():
            if config.leaks == "refuse":
                refuse_leaks(backbone, task)
            elif leaked := find_leaks(backbone, task):
                refused.append({"backbone": backbone.name, "task": task.name, "groups": len(leaked)})
    skip = {(r["backbone"], r["task"]) for r in refused}
    result = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "config": asdict(config),
        "environment": environment(device),
        "tasks": {},
        "refused": refused,
        "results": [],
        "differences": [],
        "backbones": {
            b.name: {
                "spec": b.spec,
                "architecture": b.architecture,
                "px": px[spec],
                "sha": [b.sha],
                "provenance": summary(b.provenance),
            }
            for spec, b in backbones.items()
        },
    }
    arrays = {}
    for name, task in loaded.items():
        rows = {}
        for spec, backbone in backbones.items():
            if (backbone.name, name) in skip:
                continue
            run = segmentation_rows if name == "busi_seg" else classification_rows
            for row, estimates in run(config, task, spec, px[spec], device, cache, arrays, result):
                rows[backbone.name, row["protocol"], row["fraction"], row["level"]] = estimates
                result["results"].append(row)
        result["differences"] += differences(name, rows)
        result["tasks"][name] = describe(task, config, result)
    result["seconds"] = round(time.time() - started, 1)
    np.savez_compressed(out / "arrays.npz", **arrays)
    (out / "results.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    report.write(out)
    if config.model_card:
        report.update_model_card(Path(config.model_card), result)
    print(report.markdown_tables(result))
    print(f"{out / 'report.html'} written, {result['seconds']:.0f} s")
    return out


def check(config: Config):
    """Refuse settings that cannot work before anything is decoded. Raises ValueError."""
    for given, known, what in (
        (config.protocols, protocols.PROTOCOLS, "protocols"),
        ((config.leaks,), ("refuse", "skip"), "leaks"),
        ((config.crop,), ("none", "crop", "blank"), "crop"),
        (config.segment.heads, segment.HEADS, "segment.heads"),
    ):
        for name in given:
            if name not in known:
                raise ValueError(f"{what}: no {name!r}; choose from {', '.join(known)}")
    names = [split_name(spec)[0] for spec in config.backbones]
    if len(set(names)) < len(names):
        raise ValueError(
            f"backbones: two of the same name among {', '.join(names)}; give one a label, as in 'ours=FOLDER'"
        )
    for name in ("backbones", "tasks", "seeds", "fractions"):
        if not getattr(config, name):
            raise ValueError(f"{name}: give at least one")
    if config.folds < 2 or any(not 0 < f <= 1 for f in config.fractions):
        raise ValueError("folds must be at least 2 and fractions in (0, 1]")


def input_sizes(config: Config) -> dict[str, int]:
    own = {spec: None if is_random(spec) else load_backbone(spec).px for spec in config.backbones}
    first = next((px for px in own.values() if px), 64)
    return {spec: config.px or px or first for spec, px in own.items()}


def environment(device: str) -> dict:
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": git.stdout.strip() if git.returncode == 0 else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "scikit-learn": sklearn.__version__,
        "device": device,
    }


def summary(provenance: dict | None) -> dict | str:
    """The provenance without the long lists that the leak check has read."""
    if provenance is None:
        return "unknown"
    return {key: f"{len(value)} entries" if key in ("groups", "clips") else value for key, value in provenance.items()}


def classification_rows(config, task, spec, px, device, cache, arrays, result):
    """Yields one (row of results.json, its Estimates) for every protocol, label fraction and level."""
    frames = tasks.load_frames(task, px, cache, config.rate, config.crop, config.workers or None, config.max_excluded)
    classes, name = len(task.classes), split_name(spec)[0]
    labels, groups = task.labels, task.groups
    collected = {}
    for seed in config.seeds:
        folds = tasks.make_folds(labels, groups, task.classes, config.folds, seed, task.title)
        arrays[f"folds/{task.name}/{seed}"] = folds
        backbone = load_backbone(spec, seed, px)
        if backbone.sha not in result["backbones"][name]["sha"]:
            result["backbones"][name]["sha"].append(backbone.sha)
        features = protocols.features(backbone, frames, cache, device)
        if seed == config.seeds[0] and f"tsne/{task.name}/{name}" not in arrays:
            arrays[f"tsne/{task.name}/{name}"] = embed(protocols.pool_frames(features, frames.item, len(task.items)))
        activations = None
        for protocol in config.protocols:
            recipe = {"finetune_last": config.last, "finetune_full": config.full}.get(protocol)
            for fraction in config.fractions:
                described = [
                    backbone.sha,
                    backbone.mean,
                    backbone.std,
                    frames.key,
                    task.classes,
                    folds.tolist(),
                    protocol,
                    fraction,
                    seed,
                    recipe and asdict(recipe),
                ]
                key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:20]
                file = cache / f"cell-{key}.npy"
                if not file.exists():
                    inputs = features
                    if protocol == "finetune_last":
                        if activations is None:
                            activations = protocols.before_last_block(backbone, frames.images, device)
                        inputs = activations
                    elif protocol == "finetune_full":
                        inputs = frames.images
                    said = f"{task.name} {name} {protocol} {fraction:.0%} seed {seed}"
                    with tqdm(total=config.folds, desc=said, unit="fold", file=sys.stderr) as bar:
                        values = protocols.out_of_fold(
                            protocol,
                            inputs,
                            labels,
                            groups,
                            folds,
                            frames.item,
                            classes,
                            fraction,
                            seed,
                            backbone,
                            recipe,
                            device,
                            bar.update,
                        )
                    protocols.save_atomically(file, lambda f, values=values: np.save(f, values))
                probabilities = np.load(file)
                arrays[f"scores/{task.name}/{name}/{protocol}/{fraction:g}/{seed}"] = protocols.pool_frames(
                    probabilities, frames.item, len(task.items)
                ).astype(np.float32)
                collected.setdefault((protocol, fraction), []).append(probabilities)
    arrays[f"labels/{task.name}"] = labels
    for (protocol, fraction), seeds in collected.items():
        pooled = [protocols.pool_frames(p, frames.item, len(task.items)) for p in seeds]
        levels = {"video" if task.has_video else "image": (pooled, np.arange(len(task.items)))}
        if task.has_video:
            levels["frame"] = (seeds, frames.item)
        for level, (scores, item) in levels.items():
            y, g, s = np.tile(labels[item], len(seeds)), np.tile(groups[item], len(seeds)), np.concatenate(scores)
            estimates = intervals.classification(y, s, g, task.classes, config.draws)
            yield (
                {
                    "task": task.name,
                    "backbone": name,
                    "protocol": protocol,
                    "fraction": fraction,
                    "level": level,
                    "n": len(item),
                    "groups": len(set(groups)),
                    "found": task.found,
                    "excluded": len(task.excluded),
                    "metrics": {key: e.to_dict() for key, e in estimates.items()},
                    "confusion": confusion_matrix(y, s.argmax(1), labels=range(classes)).tolist(),
                },
                estimates,
            )


def segmentation_rows(config, task, spec, px, device, cache, arrays, result):
    name = split_name(spec)[0]
    yield from segment.rows(config, task, spec, name, device, cache, arrays)


def embed(x: np.ndarray) -> np.ndarray:
    """t-SNE of the items' mean features, float32 (items, 2)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=0).fit_transform(x).astype(np.float32)
        )


def differences(task: str, rows: dict) -> list[dict]:
    """Every later backbone minus every earlier one, on the same folds and draws."""
    found = []
    keys = list(rows)
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            if a[0] == b[0] or a[1:] != b[1:]:
                continue
            for metric in rows[a]:
                d = rows[b][metric] - rows[a][metric]
                found.append(
                    {
                        "task": task,
                        "protocol": a[1],
                        "fraction": a[2],
                        "level": a[3],
                        "backbone": b[0],
                        "against": a[0],
                        "metric": metric,
                        **d.to_dict(),
                        "verdict": intervals.verdict(d),
                    }
                )
    return found


def describe(task: tasks.Task, config: Config, result: dict) -> dict:
    counts = {name: int((task.labels == i).sum()) for i, name in enumerate(task.classes)}
    return {
        "title": task.title,
        "classes": list(task.classes),
        "found": task.found,
        "used": len(task.items),
        "by_class": counts,
        "groups": len(set(task.groups)),
        "groups_by_class": {c: len(set(task.groups[task.labels == i])) for i, c in enumerate(task.classes)},
        "excluded": [list(e) for e in task.excluded],
        "notes": task.notes,
        "items": [[item.id, item.label, item.group] for item in task.items],
    }


if __name__ == "__main__":
    settings = configs.cli(Config, __doc__)
    try:
        main(settings)
    except (tasks.TaskError, LeakError, ValueError) as error:
        sys.exit(f"evaluate.py: {type(error).__name__}: {error}")
