"""A whole run: labels -> plan -> every recipe out of fold -> choice -> training on everything -> export, report."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from training.evaluation.backbones import Backbone, load_backbone
from training.evaluation.frames import digest
from training.evaluation.leaks import find_leaks
from training.evaluation.tables import table
from training.evaluation.task import Item, Task
from training.messages import say
from training.tuning import export, labels, network, pixels, problem, report, scores, search
from training.tuning.network import Setting
from training.tuning.plan import Plan
from training.tuning.search import Tried
from uscl_hub import models
from uscl_hub.clips import content_hash
from uscl_hub.errors import UserError
from uscl_hub.files import check_room, write_whole
from uscl_hub.labels import TASKS, LabelError, Labels

SEGMENTATION_PX = 128  # at least: outlines in 64 px squares are coarse
VERSION = 2  # of all that decides what a run finds


@dataclass
class FinetuneConfig:
    """Tune a model on own labelled images."""

    data: str
    """A folder of folders, one a class; a table (labels.csv, .tsv, .parquet) with the column path, one or more columns
    of labels, and best a column group (the patient); or images with masks (x.png and x_mask.png, or images/ and
    masks/). Rows whose column split says 'test' are scored once by the finished model, as --test."""
    out: str = "runs/finetune"
    """plan.json, results.json, report.html, export/; what is finished there is not done again."""
    backbones: tuple[str, ...] = ()
    """Released names, exported folders, imagenet, timm:NAME (random weights), timm:NAME:pretrained; 'label=' before one
    names it. (): the default release."""
    minutes: float = 20.0
    """For all that is tried and the last training; decoding and the report come on top."""
    task: str = "auto"
    """classification, multilabel, regression, segmentation; 'auto': as the labels look."""
    columns: tuple[str, ...] = ()
    """The table's label columns; (): 'label', else all but path, group, split and mask."""
    frames: str = "images"
    """Numbered images of one folder are 'images' of their own, or each such series is one 'clip'."""
    classes: tuple[str, ...] = ()
    """Only these classes, in this order; (): all."""
    test: str = ""
    """Other labelled data, of other patients: the finished model is scored on it once."""
    limit: int = 0
    """Use only so many of the labelled files, group by group, of all classes alike; the last group may be cut; 0: all.
    For learning curves: a smaller number is a part of a larger one."""
    folds: int = 3
    """Parts without common groups; each is scored by models that were trained on the others."""
    px: int = 0
    """Side of the squashed image; 0: the backbone's own, for segmentation 128 at least."""
    crop: str = "none"
    """'crop' or 'blank' uses the detected moving region of a clip only."""
    seed: int = 0
    """Of folds, heads, order and augmentation."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    onnx: bool = False
    """Write export/model.onnx too."""
    plan: str = ""
    """plan.json of another run on the same data: take its decisions instead of the clock's, for the same bits."""


def check(config: FinetuneConfig) -> None:
    """Refuse settings that cannot work before anything is read."""
    if config.folds < 2 or config.minutes <= 0 or config.limit < 0 or config.px < 0:
        raise UserError("folds must be at least 2, minutes above 0, limit and px 0 or more")
    for name, given, known in (
        ("crop", config.crop, ("none", "crop", "blank")),
        ("frames", config.frames, ("images", "clip")),
        ("task", config.task, ("auto", *TASKS)),
        ("device", config.device, ("auto", "cpu", "cuda")),
    ):
        if given not in known:
            raise UserError(f"{name}: no {given!r}; choose from {', '.join(known)}")
    if config.onnx:
        export.check_onnx()
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: torch sees no CUDA device here; leave --device at 'auto'")


def run(config: FinetuneConfig) -> dict:
    """Everything; returns what results.json holds. Raises UserError."""
    check(config)
    out = Path(config.out)
    found = labels.read(config.data, config.task, config.columns, config.classes, config.frames)
    found, test = labels.without_test(found)
    if config.test:
        if test is not None:
            raise LabelError(
                f"{config.data}: has rows of the split 'test', and --test names another test set; leave one of them out"
            )
        test = _test(config, found)
    found = labels.limited(found, config.limit, config.seed)
    folds = search.split(found, config.folds, config.seed)
    if config.crop != "none" and found.task == "segmentation":
        raise UserError("crop: masks are of the whole image; leave --crop at 'none'")
    for line in (about(found), imbalance(found), *found.notes):
        say(line)
    settings = make_settings(config, found, out / "cache")
    if test is not None:  # a file that cannot be read is known before the training
        for px in {setting.pixels.px for setting in settings}:
            pixels.load(test, px, config.crop, out / "cache")
    weights = [sum(p.nbytes for p in setting.backbone.model.parameters()) for setting in settings]
    check_room(out, max(weights))
    key = [
        VERSION,
        found.sha(),
        folds.tolist(),
        config.crop,
        config.seed,
        *((s.backbone.sha, s.pixels.px) for s in settings),
    ]
    plan = Plan(out / "plan.json", digest(key), config.minutes, Path(config.plan) if config.plan else None)
    tried = search.try_all(settings, folds, plan, out / "cache", say)
    result, chosen, items = _judge(config, tried, folds, plan)
    model = search.train_on_all(chosen, plan, out / "cache")
    folder = export.write(out / "export", model, chosen.setting, _provenance(config, result))
    export.check(folder, model, chosen.setting)
    if config.onnx:
        difference = export.write_onnx(folder, model, chosen.setting.pixels.px)
        say(f"{folder / export.ONNX_NAME}: differs from PyTorch by {difference:.1g} at most")
    if test is not None:
        result["test"] = _score_test(config, test, model, chosen, result["temperature"])
    _finish(out, report.Found(chosen, items, "", model), result, tried)
    return result


# ----------------------------------------------------------------------------------------------------------- data


def about(found: Labels) -> str:
    names = {"image": "images", "video": "videos", "dicom": "DICOM files", "frames": "folders of frames"}
    kinds = {kind: sum(item.kind == kind for item in found.items) for kind in names}
    files = ", ".join(f"{n} {names[kind]}" for kind, n in kinds.items() if n)
    return f"{found.task} of {', '.join(found.classes)}: {files}; {len(set(found.groups))} groups"


def imbalance(found: Labels) -> str:
    """One sentence on how classes of different size are treated."""
    described = problem.describe(found)
    if found.task == "classification":
        counts = np.bincount(found.targets, minlength=len(found.classes))
        each = ", ".join(f"{name} {n} x {w:.2f}" for name, n, w in zip(found.classes, counts, described.weights))
        return f"Classes count alike in the loss (files x weight: {each})."
    if found.task == "multilabel":
        each = ", ".join(f"{name} {w:.2f}" for name, w in zip(found.classes, described.weights))
        return f"Positives of a label are weighted as much as its negatives (weight: {each})."
    return (
        "All files count alike."
        if found.task == "regression"
        else "Loss: cross-entropy of pixels and Dice of images, so that small lesions count."
    )


def _test(config: FinetuneConfig, found: Labels) -> Labels:
    """--test, of the same classes and of other files and groups."""
    test = labels.read(config.test, found.task, config.columns, config.classes, config.frames)
    if test.classes != found.classes:
        raise LabelError(
            f"test: {config.test} has {', '.join(test.classes)}, --data has {', '.join(found.classes)}. Name the same "
            "ones, or choose with --classes (or --columns)"
        )
    labels.check_whole(test, f"test: {config.test}")
    known = {content_hash(item.clip) for item in found.items}
    if same := [item.id for item in test.items if content_hash(item.clip) in known]:
        raise LabelError(f"test: {len(same)} of its files are in --data too ({same[0]}): take them out of one of both")
    if found.groups_known and test.groups_known and (both := set(test.groups) & set(found.groups)):
        raise LabelError(f"test: {len(both)} groups are in --data too ({min(both)}): take them out of one of both")
    return test


def make_settings(config: FinetuneConfig, found: Labels, cache: Path) -> list[Setting]:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    described, settings = problem.describe(found), []
    for spec in config.backbones or (next(iter(models.releases())),):
        backbone = load_backbone(spec, config.seed, config.px)
        if found.task == "segmentation" and not config.px:
            backbone = load_backbone(spec, config.seed, max(SEGMENTATION_PX, backbone.px))
        if backbone.name in {s.backbone.name for s in settings}:
            raise UserError(f"backbones: two are called {backbone.name}; name one, as in 'mine={spec}'")
        if leaks := leaked(backbone, found):
            say(leaks)
        shown = pixels.load(found, backbone.px, config.crop, cache)
        settings.append(Setting(backbone, described, found, shown, config.seed, device))
    return settings


def leaked(backbone: Backbone, found: Labels) -> str:
    """A warning if the backbone was pretrained on files or groups of the data, else ''."""
    items = [
        Item(i.id, i.clip.files[0], i.kind, "", str(g), files=i.clip.files if i.kind == "frames" else ())
        for i, g in zip(found.items, found.groups)
    ]
    groups = find_leaks(backbone, Task("data", "own data", found.classes, items))
    if not groups:
        return ""
    return (
        f"warning: {backbone.name} was pretrained on {len(groups)} of the {len(set(found.groups))} groups: its "
        "out-of-fold scores are too good for new patients"
    )


# -------------------------------------------------------------------------------------------------------- results


def _judge(config: FinetuneConfig, tried: list[Tried], folds: np.ndarray, plan: Plan) -> tuple[dict, Tried, np.ndarray]:
    chosen = search.choose(tried)
    setting, described = chosen.setting, chosen.setting.problem
    targets, groups = setting.found.targets, setting.found.groups
    temperature = problem.fit_temperature(described, chosen.logits, targets, setting.pixels)
    items = problem.item_scores(described, chosen.logits, setting.pixels, temperature)
    own = scores.estimates(described, targets, items, groups)
    by, stops = scores.CHOSEN_BY[described.task], sum(len(t.stops) for t in tried)
    lost = search.optimism(tried, chosen, folds)
    backbones = {t.setting.backbone.name: t.setting.backbone for t in tried}.values()
    honesty = (
        f"Chosen among {len(tried)} recipe{'s' * (len(tried) > 1)} of {stops} settings by this same out-of-fold {by}, "
        f"{report.estimate(own[by])}, which is therefore a little too good: choosing again for every fold without its "
        f"labels gives {own[by].value - lost:.3f}."
    )
    result = {
        "task": described.task,
        "names": list(described.names),
        "items": len(targets),
        "groups": len(set(groups)),
        "chosen": chosen.name,
        "recipe": f"{chosen.recipe.name}, {search.stopped(chosen)}",
        "temperature": temperature,
        "scores": {k: e.to_dict() for k, e in own.items()},
        "optimism": lost,
        "honesty": honesty,
        "imbalance": imbalance(setting.found),
        "notes": [*setting.found.notes, *(leaked(b, setting.found) for b in backbones if leaked(b, setting.found))],
        "left_out": {name: d["why"] for name, d in plan.decisions.items() if not d["epochs"]},
        "table": report.tried_table(tried, chosen),
        "config": asdict(config),
    }
    return result, chosen, items


def _provenance(config: FinetuneConfig, result: dict) -> dict:
    kept = ("items", "chosen", "recipe", "temperature", "scores", "optimism", "honesty", "imbalance")
    return {k: result[k] for k in kept} | {
        "crop": config.crop,
        "seed": config.seed,
        "folds": config.folds,
        "rate": pixels.RATE,
    }


def _score_test(
    config: FinetuneConfig, test: Labels, model: torch.nn.Module, chosen: Tried, temperature: float
) -> dict:
    setting = replace(chosen.setting, found=test, device="cpu")
    shown = pixels.load(test, setting.pixels.px, config.crop, Path(config.out) / "cache")
    setting = replace(setting, pixels=shown)
    logits = network.predict(model, setting, np.arange(len(shown.images)))
    items = problem.item_scores(setting.problem, logits, shown, temperature)
    found = scores.estimates(setting.problem, test.targets, items, test.groups)
    return {
        "items": len(test.items),
        "groups": len(set(test.groups)),
        "scores": {k: e.to_dict() for k, e in found.items()},
    }


def _finish(out: Path, shown: report.Found, result: dict, tried: list[Tried]) -> None:
    shown.text = text(result)
    report.write(out / "report.html", shown)
    content = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
    write_whole(out / "results.json", lambda path: path.write_text(content, encoding="utf-8"))
    say("\n".join(("", result["table"], "", result["honesty"], *_left_out(result))))
    if "test" in result:
        say(f"test, {result['test']['items']} files: {_few(result['test']['scores'], result['task'])}")
    say(f"{out / 'export'}: the model. {out / 'report.html'}: look at it.")


def _left_out(result: dict) -> list[str]:
    return [f"{name}: {why}" for name, why in result["left_out"].items()]


def _few(found: dict, task: str) -> str:
    wanted = [k for k in ("AUROC", "macro-F1", "balanced accuracy", "R2", "MAE", "Spearman", "Dice") if k in found]
    return ", ".join(f"{k} {report.estimate(found[k])}" for k in wanted)


def text(result: dict) -> str:
    """Markdown of the report's head."""
    rows = [[k, report.estimate(e)] for k, e in result["scores"].items()]
    head = ["score", "out of fold"]
    if "test" in result:
        head.append(f"external test, {result['test']['items']} files")
        rows = [[*row, report.estimate(result["test"]["scores"][row[0]])] for row in rows]
    notes = [*result["notes"], *_left_out(result)]
    fitted = "; out of fold, calibration errors are of the predictions that the temperature was fitted on"
    calibrated = fitted if scores.CALIBRATION in result["scores"] else ""
    parts = [
        f"# {result['task'].capitalize()}: {', '.join(result['names'])}",
        f"{result['items']} files of {result['groups']} groups. {result['imbalance']}",
        f"Chosen: **{result['chosen']}**. {result['honesty']} Temperature {result['temperature']:.3g}.",
        result["table"],
        table(head, rows),
        f"Values with 95 % intervals over groups{calibrated}. Not a medical device.",
        *(["\n".join(f"- {note}" for note in notes)] if notes else []),
    ]
    return "\n\n".join(parts)
