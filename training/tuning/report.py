"""report.html of a run: one file that needs nothing else."""

import base64
import html
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

from training.evaluation import intervals
from training.evaluation.report import STYLE, to_html
from training.evaluation.tables import table
from training.tuning import cam, figures, scores
from training.tuning.problem import balance, dice
from training.tuning.search import Tried, stopped
from uscl_hub.files import write_whole

MISTAKES = 24
EACH = 4  # Grad-CAM images of a class
GROUPS = 30  # rows of the table by group


@dataclass
class Found:
    """What a report shows. chosen: the recipe. items: float (items, d), calibrated, out of fold. text: Markdown of the
    head: tables and notes. model: trained on everything."""

    chosen: Tried
    items: np.ndarray
    text: str
    model: torch.nn.Module

    @property
    def positive(self) -> np.ndarray:
        """bool (items, outputs)."""
        return scores.positive(self.chosen.setting.problem, self.chosen.setting.found.targets)


def write(path: Path, found: Found) -> None:
    parts = [("", found.text), *_sections(found)]
    body = []
    for title, content in parts:
        if title:
            body.append(f"<h2>{html.escape(title)}</h2>")
        body.append(to_html(content) if isinstance(content, str) else _picture(content, title))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>Fine-tuning on own data</title>'
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(body) + "\n</body></html>\n"
    )
    write_whole(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _picture(figure, title: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    text = base64.b64encode(file.getvalue()).decode()
    return f'<figure><img alt="{html.escape(title)}" src="data:image/png;base64,{text}"></figure>'


def _sections(found: Found) -> list:
    task = found.chosen.setting.problem.task
    if task == "regression":
        targets, names = found.chosen.setting.found.targets, found.chosen.setting.problem.names
        parts = [("Predicted against true", figures.regression(targets, found.items, names)), _mistakes(found)]
    elif task == "segmentation":
        parts = [_outlines(found)]
    else:
        parts = [*_classification(found), _mistakes(found), _cams(found)]
    return [*parts, ("Score by group", _by_group(found))]


def _classification(found: Found):
    setting = found.chosen.setting
    names, positive, groups = setting.problem.names, found.positive, setting.found.groups
    if setting.problem.task == "classification":
        predicted = found.items.argmax(1)
        yield "Confusion matrix, out of fold", figures.confusion(setting.found.targets, predicted, names)
    shown = scores.shown(setting.problem)
    names, part = tuple(names[c] for c in shown), (positive[:, shown], found.items[:, shown])
    weight = balance(setting.problem, setting.found.targets)[:, shown]
    yield "ROC and precision-recall, out of fold", figures.curves(*part, groups, names)
    yield "Reliability, out of fold, after calibration", figures.calibration(*part, weight, names)


def _loss(found: Found) -> np.ndarray:
    """How wrong every item is, float (items,): 1 - probability of the truth, the largest relative error, 1 - Dice."""
    setting = found.chosen.setting
    if setting.problem.task == "regression":
        return (np.abs(found.items - setting.found.targets) / setting.problem.std).max(1)
    if setting.problem.task == "segmentation":
        return 1 - found.items[:, 0]
    truth = np.where(found.positive, found.items, 1 - found.items)
    return 1 - (
        found.items[np.arange(len(truth)), setting.found.targets]
        if setting.problem.task == "classification"
        else truth.min(1)
    )


def _middle(found: Found, item: int) -> int:
    frames = np.flatnonzero(found.chosen.setting.pixels.item == item)
    return int(frames[len(frames) // 2])


def _mistakes(found: Found):
    setting, loss = found.chosen.setting, _loss(found)
    problem, targets = setting.problem, setting.found.targets
    order = np.argsort(-loss, kind="stable")[:MISTAKES]
    if problem.task == "classification":
        order = [i for i in order if found.items[i].argmax() != targets[i]]
        titles = [
            f"{problem.names[targets[i]]}, said\n{problem.names[found.items[i].argmax()]} {found.items[i].max():.2f}"
            for i in order
        ]
    elif problem.task == "multilabel":
        wrong = np.where(found.positive, found.items, 1 - found.items).argmin(1)
        titles = [
            f"{problem.names[wrong[i]]} is {targets[i, wrong[i]]:g},\nsaid {found.items[i, wrong[i]]:.2f}"
            for i in order
        ]
    else:
        titles = [f"true {targets[i, 0]:.3g}\nsaid {found.items[i, 0]:.3g}" for i in order]
        return "The largest errors, out of fold", _sheet(found, order, titles)
    if not len(order):
        return "The most confident mistakes", "None: every file is right out of fold."
    return "The most confident mistakes, out of fold", _sheet(found, order, titles)


def _sheet(found: Found, order, titles: list[str]):
    return figures.sheet([found.chosen.setting.pixels.images[_middle(found, i)] for i in order], titles)


def _cams(found: Found):
    setting = found.chosen.setting
    title, positive = "Grad-CAM: what spoke for the true class (model of all files, surest first)", found.positive
    chosen = []
    for c in range(setting.problem.outputs):
        own = np.flatnonzero(positive[:, c])
        chosen += [(i, c) for i in own[np.argsort(-found.items[own, c], kind="stable")][:EACH]]
    frames = np.array([_middle(found, i) for i, _ in chosen])
    try:
        heat = cam.overlays(found.model, setting, frames, np.array([c for _, c in chosen]))
    except ImportError:
        return (
            title,
            "Not drawn: `pip install grad-cam` and run the same command again; it goes on from what is finished.",
        )
    if heat is None:
        return title, "Not drawn: this architecture has no feature map of 4 x 4 pixels or more."
    titles = [f"{setting.problem.names[c]} {found.items[i, c]:.2f}" for i, c in chosen]
    return title, figures.sheet(list(setting.pixels.images[frames]), titles, heat)


def _outlines(found: Found):
    setting, logits = found.chosen.setting, found.chosen.logits[:, 0]
    order = np.argsort(found.items[:, 0], kind="stable")
    shown = np.unique(np.concatenate([order[:8], order[np.linspace(0, len(order) - 1, 16).astype(int)]]))
    shown = shown[np.argsort(found.items[shown, 0], kind="stable")]
    titles = [f"Dice {found.items[i, 0]:.2f}" for i in shown]
    pixels = setting.pixels
    assert np.allclose(dice(logits[shown] > 0, pixels.masks[shown]), found.items[shown, 0])
    figure = figures.outlines(pixels.images[shown], pixels.masks[shown], logits[shown] > 0, titles)
    return "Outlines, out of fold: true green, predicted orange; the worst first", figure


def _by_group(found: Found) -> str:
    setting, loss = found.chosen.setting, _loss(found)
    groups = setting.found.groups
    head = {"regression": "mean error / sd", "segmentation": "mean of 1 - Dice"}
    head = head.get(setting.problem.task, "mean of 1 - probability of the truth")
    rows = sorted(
        ((loss[groups == g].mean(), g, (groups == g).sum()) for g in sorted(set(groups))), key=lambda r: (-r[0], r[1])
    )
    text = table(["group", "files", head], [[f"`{g}`", n, f"{v:.3f}"] for v, g, n in rows[:GROUPS]])
    return f"The worst {min(GROUPS, len(rows))} of {len(rows)} groups:\n\n{text}"


def estimate(e: intervals.Estimate | dict) -> str:
    e = e if isinstance(e, dict) else e.to_dict()
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"


def tried_table(tried: list[Tried], chosen: Tried) -> str:
    """Every recipe: what it reached out of fold with its interval, where it stopped, its time."""
    problem, rows = chosen.setting.problem, []
    wanted = {"classification": ("AUROC", "macro-F1"), "multilabel": ("AUROC", "macro-F1")}
    wanted = wanted.get(problem.task, {"regression": ("R2", "MAE"), "segmentation": ("Dice",)}.get(problem.task))
    for t in tried:
        found = scores.estimates(problem, t.setting.found.targets, t.items[t.best], t.setting.found.groups)
        rows.append(
            [
                t.name,
                *(estimate(found[w]) for w in wanted),
                stopped(t),
                f"{t.seconds:.0f} s",
                "chosen" if t is chosen else "",
            ]
        )
    return table(["recipe", *wanted, "stops at", "time", ""], rows)
