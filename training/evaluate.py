"""Judge backbones on real tasks: `python training/evaluate.py [--config FILE.yaml] [--dotted.override VALUE ...]`.

`--data FOLDER_OR_TABLE` of your own, and if you have one `--test OTHER`; or the built-in tasks. Decode once -> folds by
group -> features once -> kNN, linear probe, fine-tuning, segmentation -> intervals over groups, paired differences ->
results.json, report.md, plots, report.html; with --model-card also its tables. Every finished fold is cached: an
interrupted run, started again, goes on where it stopped.
"""

import datetime
import functools
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import sklearn  # noqa: E402
import timm  # noqa: E402
import torch  # noqa: E402
import torchvision  # noqa: E402

from training import config as configs  # noqa: E402
from training.engine import export  # noqa: E402
from training.evaluation import (  # noqa: E402
    datasets,
    leaks,
    own,
    protocols,
    report,
    rows,
    segmentation,
)
from training.evaluation.backbones import (  # noqa: E402
    is_imagenet,
    is_random,
    load_backbone,
    split_name,
    split_px,
)
from training.evaluation.fine_tuning import FineTune  # noqa: E402
from training.evaluation.segmentation import Segment  # noqa: E402
from training.evaluation.task import EvaluationError, Task, check_excluded  # noqa: E402
from training.messages import command, say, without_folders  # noqa: E402
from uscl_hub import files  # noqa: E402
from uscl_hub.labels import TASKS  # noqa: E402

DATA = Path(os.environ.get("USCL_DATA", "data"))
DEFAULT_TASKS = ("pocus", "busi", "busi3", "blues")


@dataclass
class EvaluateConfig:
    """Evaluate backbones on downstream ultrasound tasks."""

    backbones: tuple[str, ...] = ("random:resnet18",)
    """random:NAME, timm:NAME (random too), timm:NAME:pretrained, imagenet (EfficientNet-Lite0; extra [imagenet]) or
    imagenet:lite1, imagenet:lite2, meta_uscl_NAME[.tag], or an exported or converted folder, where '{seed}' stands for
    each seed; 'label=' before it names it in the report, '@PX' after it gives it an input size of its own
    (imagenet@224). Differences are from the first one."""
    tasks: tuple[str, ...] = ()
    """own (the labels in --data), pocus (3 classes, by patient), busi (benign / malignant), busi3, blues (COVID-BLUES
    severity), blues_point (scan points of its clips: for tuning), busi_seg, bus_uc (breast, benign / malignant), ovary
    (8 classes). None: own, or pocus, busi, busi3 and blues where --data is the folder that holds them."""
    protocols: tuple[str, ...] = ("knn", "linear")
    """knn, linear, finetune_last, finetune_full; segmentation is trained with segment.heads instead."""
    fractions: tuple[float, ...] = (1.0,)
    """Shares of the training groups that keep their label, such as 0.1 0.25 1; or numbers of labelled files, such as
    25 50 100 200: whole groups, so the last one may bring a few more."""
    seeds: tuple[int, ...] = (0,)
    """Each seed makes its own folds, random weights and order; all are pooled."""
    folds: int = 5
    """Folds by group."""
    data: str = str(DATA / "classification")
    """Your own labels: a folder CLASS/file, images with masks, or a table with the columns path and label (and group,
    split, mask). Or the folder that holds pocus_lung, busi, bus_uc and ovary; default: $USCL_DATA/classification."""
    test: str = ""
    """Other labels as in --data: trained on all of --data, tested once on these. '': tested in folds."""
    task: str = ""
    """What own labels are: classification, multilabel, regression or segmentation. '': to be seen from them."""
    columns: tuple[str, ...] = ()
    """Columns of labels in own tables. None: label, else all but path, group, split and mask."""
    classes: tuple[str, ...] = ()
    """Only these classes of own labels. None: all."""
    frames: str = "images"
    """Numbered images of one folder of own labels: 'images' of their own, or one 'clip'."""
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
    64. A size after '@' comes first. Segmentation takes segment.px for all of them."""
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
    """Segmentation: busi_seg, or own images with masks."""


Config = EvaluateConfig  # its name up to version 0.1


def main(config: EvaluateConfig) -> Path:
    """Run everything and return the output folder. Raises UserError."""
    started = time.time()
    config = with_tasks(config)
    check(config)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    loaded = load_tasks(config)
    px = input_sizes(config)
    backbones, refused = inspect(config, px, loaded)
    out = Path(config.out)
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
        "look_alikes": look_alikes(config, px, loaded, refused),
        "results": [],
        "differences": [],
    }
    arrays = {}
    for task in loaded:
        found = []
        for spec in config.backbones:
            if (split_name(spec)[0], task.name) not in refused:
                found += rows.rows(config, task, spec, px[spec], device, arrays)
        result["results"] += [row for row, _ in found]
        result["differences"] += rows.differences(found)
        result["tasks"][task.name] = rows.describe(task, config)
    result["seconds"] = round(time.time() - started, 1)
    write(config, result, arrays)
    return out


def write(config: EvaluateConfig, result: dict, arrays: dict):
    """results.json, arrays.npz and what is made of them."""
    out = Path(config.out)
    files.write_whole(out / "arrays.npz", functools.partial(np.savez_compressed, **arrays))
    files.write_json(out / "results.json", result)
    report.write(out)
    if config.model_card:
        report.update_model_card(Path(config.model_card), result, config.section)
    print(report.markdown_tables(result))
    print(f"{out / 'report.html'} written, {result['seconds']:.0f} s")


def with_tasks(config: EvaluateConfig) -> EvaluateConfig:
    """The settings with the tasks that are meant where none are named."""
    if config.tasks:
        return config
    folders = {folder for folder, _ in datasets.BUILT_IN.values()}
    mine = (
        config.test or config.data != EvaluateConfig.data and not any((Path(config.data) / f).is_dir() for f in folders)
    )
    return replace(config, tasks=(own.NAME,) if mine else DEFAULT_TASKS)


def load_tasks(config: EvaluateConfig) -> list[Task]:
    """The tasks, with what is to be known of own data on the terminal. Raises UserError."""
    data = DATA / "classification" if own.NAME in config.tasks else Path(config.data)
    source = own.OwnData(config.data, config.test, config.task, config.columns, config.classes, config.frames)
    loaded = [
        own.load_own(source) if name == own.NAME else datasets.load_task(name, data, Path(config.blues))
        for name in config.tasks
    ]
    for task in loaded:
        if task.kind == "segmentation" and config.crop != "none":
            raise EvaluationError(f"crop: masks of {task.name} are of the whole image; leave --crop at 'none'")
        check_excluded(task, config.max_excluded)
        for note in task.notes if task.name == own.NAME else ():
            say(f"{task.title}: {note}")
    return loaded


def check(config: EvaluateConfig):
    """Refuse settings that cannot work before anything is decoded."""
    for given, known, what in (
        (config.tasks, (*datasets.NAMES, own.NAME), "tasks"),
        ((config.task,), ("", *TASKS), "task"),
        ((config.frames,), ("images", "clip"), "frames"),
        (config.protocols, protocols.PROTOCOLS, "protocols"),
        ((config.leaks,), ("refuse", "skip"), "leaks"),
        ((config.crop,), ("none", "crop", "blank"), "crop"),
        ((config.device,), ("auto", "cpu", "cuda"), "device"),
        (config.segment.heads, segmentation.HEADS, "segment.heads"),
    ):
        for name in given:
            if name not in known:
                raise EvaluationError(f"{what}: no {name!r}; choose from {', '.join(filter(None, known))}")
    for name in ("backbones", "tasks", "seeds", "fractions"):
        if not getattr(config, name):
            raise EvaluationError(f"{name}: give at least one")
    names = [split_name(spec)[0] for spec in config.backbones]
    if len(set(names)) < len(names):
        raise EvaluationError(f"backbones: {', '.join(names)} are not all different; name one, as in 'ours=FOLDER'")
    if unknown := set(config.compare) - set(names):
        raise EvaluationError(f"compare: {', '.join(sorted(unknown))} is not among the backbones {', '.join(names)}")
    if (config.test or config.task or config.columns or config.classes) and own.NAME not in config.tasks:
        raise EvaluationError(
            "test, task, columns and classes are for own labels: name them by --data, without --tasks"
        )
    if config.folds < 2 or config.draws < 1 or config.rate <= 0:
        raise EvaluationError("folds must be at least 2, draws at least 1 and rate above 0")
    shares, numbers = (all(low < f <= high for f in config.fractions) for low, high in ((0, 1), (1, 1e9)))
    if not shares and not numbers:
        raise EvaluationError("fractions: give shares in (0, 1], or numbers of labelled files above 1, not both")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise EvaluationError("device: torch sees no CUDA device here; leave --device at 'auto'")


def input_sizes(config: EvaluateConfig) -> dict[str, int]:
    """Side of every backbone's input; EvaluateConfig.px says by which rule."""
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


def inspect(config: EvaluateConfig, px: dict[str, int], loaded: list[Task]) -> tuple[dict, dict]:
    """What every backbone is, and how many groups of which (backbone, task) it must not be tested on."""
    backbones, refused = {}, {}
    for spec in config.backbones:
        for seed in config.seeds:
            backbone = load_backbone(spec, seed, px[spec])
            about = backbones.setdefault(
                backbone.name,
                {
                    "spec": without_folders(split_name(spec)[1]),
                    "architecture": backbone.architecture,
                    "px": backbone.px,
                    "sha": [],
                    "untrained": is_random(spec),
                    "leaks_checked": leaks.names_clips(backbone.provenance),
                    "provenance": without_folders(leaks.brief(backbone.provenance)),
                },
            )
            if backbone.sha not in about["sha"]:
                about["sha"].append(backbone.sha)
            for task in loaded:
                if config.leaks == "refuse":
                    leaks.refuse_leaks(backbone, task)
                elif leaked := leaks.find_leaks(backbone, task):
                    refused[backbone.name, task.name] = len(leaked)
    return backbones, refused


def look_alikes(config: EvaluateConfig, px: dict[str, int], loaded: list[Task], refused: dict) -> list[dict]:
    """Warnings of pictures that look like some of the pretraining, or of the training; their pairs as pictures."""
    found = [("the training data", task, leaks.find_crossing(task, Path(config.cache)), "") for task in loaded
             if task.external]  # fmt: skip
    for spec in config.backbones:
        for seed in config.seeds if "{seed}" in spec else config.seeds[:1]:
            backbone = load_backbone(spec, seed, px[spec])
            for task in loaded:
                if (backbone.name, task.name) not in refused:
                    pairs = leaks.find_near(backbone, task, Path(config.cache))
                    found.append((backbone.name, task, pairs, backbone.spec))
    told = []
    for name, task, pairs, spec in found:
        if not pairs:
            continue
        file = f"look_alikes_{len(told)}.png"
        leaks.picture(pairs, Path(spec), Path(config.out) / "figures" / file)
        shown = Path(config.out) / "figures" / file
        say(f"warning: {len(pairs)} of the files of {task.title} look like some of {name}; look at {shown}")
        entry = {"backbone": name, "task": task.name, "figure": file}
        told.append({**entry, "pairs": [pair.to_dict() for pair in pairs]})
    return told


def environment(device: str) -> dict:
    libraries = {"torch": torch, "torchvision": torchvision, "timm": timm, "scikit-learn": sklearn}
    versions = {name: module.__version__ for name, module in libraries.items()}
    return {**export.code_version(), "python": platform.python_version(), **versions, "device": device}


if __name__ == "__main__":
    settings = configs.cli(EvaluateConfig, __doc__)
    command(lambda: main(settings) and None, prefix="evaluate.py: ")
