"""Every recipe out of fold, and the choice among them."""

import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from training.evaluation.folds import make_folds, stratified
from training.evaluation.frames import cached
from training.tuning import frozen, network, scores
from training.tuning.network import Setting
from training.tuning.plan import Plan
from training.tuning.problem import item_scores
from training.tuning.recipes import CHECKS, EPOCHS, SHRINKAGE, Recipe, recipes
from uscl_hub.labels import LabelError, Labels


@dataclass
class Tried:
    """One recipe on one backbone. stops: where it may end, C of a frozen head or epochs of a training. logits: float
    (N, ...) out of fold, of the best stop. items: float (stops, items, d), what is judged. best: index into stops."""

    name: str
    setting: Setting
    recipe: Recipe
    stops: list[float]
    logits: np.ndarray
    items: np.ndarray
    best: int
    seconds: float

    @property
    def stop(self) -> float:
        return self.stops[self.best]


def split(found: Labels, folds: int, seed: int) -> np.ndarray:
    """Fold of every item, int (items,): no group in two, stratified. Raises LabelError where that cannot be."""
    groups = found.groups
    if len(set(groups)) < folds:
        raise LabelError(f"folds: {folds} folds need as many groups, there are {len(set(groups))}; use fewer --folds")
    if found.task == "classification":
        return make_folds(found.targets, groups, found.classes, folds, seed, "data")
    if found.task == "multilabel":
        _, strata = np.unique(found.targets, axis=0, return_inverse=True)
        strata = np.where(np.bincount(strata.ravel())[strata.ravel()] < folds, -1, strata.ravel())
    elif found.task == "regression":
        first = found.targets[:, 0]
        strata = np.digitize(first, np.unique(np.quantile(first, [0.25, 0.5, 0.75])))
    else:
        strata = np.zeros(len(groups), int)
    assigned = stratified(strata, groups, folds, seed)
    for fold in range(folds):
        train = found.targets[assigned != fold]
        for c, name in enumerate(found.classes if found.task == "multilabel" else ()):
            if len(set(train[:, c])) < 2:
                raise LabelError(f"data: label {name!r} is in too few groups: fold {fold} would train without it")
    return assigned


def try_all(settings: list[Setting], folds: np.ndarray, plan: Plan, cache: Path, say) -> list[Tried]:
    """Frozen features of every backbone, then trainings, of the most promising backbone first, as the plan allows.

    A training that diverges is left out. Raises UserError if nothing is left.
    """
    first = recipes(settings[0].problem.task)[0]
    tried, diverged = [], None
    if not first.epochs:
        for setting in settings:
            tried.append(try_out(setting, first, folds, plan, cache))
            say(summary(tried[-1]))
        order = sorted(range(len(settings)), key=lambda i: -_value(tried[i], tried[i].best))
        settings = [settings[i] for i in order]
    waiting = {}
    for setting in settings:
        for recipe in recipes(setting.problem.task):
            if recipe.epochs:
                waiting[_name(setting, recipe)] = setting, recipe
    cost = {name: None if name in plan.decisions else _cost(*pair, folds) for name, pair in waiting.items()}
    for name, (setting, recipe) in waiting.items():
        decision, found = plan.decide(name, {n: cost[n] for n in _from(name, waiting) if cost[n]}, not tried), None
        while decision["epochs"] and found is None:
            say(f"{name}: {decision['epochs']} epochs, about {decision['seconds'] / 60:.1f} min ({decision['why']})")
            try:
                found = try_out(setting, replace(recipe, epochs=decision["epochs"]), folds, plan, cache)
            except network.Diverged as error:
                plan.give_up(name, str(error))
                diverged = error
            decision = plan.decisions[name]
        if found is not None:
            tried.append(found)
        say(summary(found) if found else f"{name}: {decision['why']}")
    if diverged and not tried:
        raise diverged
    return tried


def _from(name: str, waiting: dict) -> list[str]:
    names = list(waiting)
    return names[names.index(name) :]


def _name(setting: Setting, recipe: Recipe) -> str:
    return f"{setting.backbone.name}, {recipe.name}"


def summary(tried: Tried) -> str:
    problem = tried.setting.problem
    return (
        f"{tried.name}: {scores.CHOSEN_BY[problem.task]} {_value(tried, tried.best):.3f} out of fold ({stopped(tried)})"
    )


def stopped(tried: Tried) -> str:
    """Where it ended: '5 of 6 epochs', or the head's 'C = 0.1'."""
    return f"{tried.stop:g} of {tried.recipe.epochs} epochs" if tried.recipe.epochs else f"C = {tried.stop:g}"


def _value(tried: Tried, stop: int, among: np.ndarray | slice = slice(None)) -> float:
    targets = tried.setting.found.targets[among]
    return scores.value(tried.setting.problem, targets, tried.items[stop][among])


def try_out(setting: Setting, recipe: Recipe, folds: np.ndarray, plan: Plan, cache: Path) -> Tried | None:
    """All folds of one recipe; None if it is so slow that the plan has decided anew."""
    started, name = time.monotonic(), _name(setting, recipe)
    parts, each, count = [], max(1, recipe.epochs), folds.max() + 1
    left = f"{name}; of the run's {plan.minutes:g} min {max(plan.remaining(), 0) / 60:.1f} are left"
    try:
        with tqdm(total=count * each, desc=left, unit="epoch", leave=False) as bar:
            for fold in range(count):
                parts.append(fold_logits(setting, recipe, folds, fold, (cache, bar)))
                bar.n = (fold + 1) * each
                bar.refresh()
                used, rest, last = time.monotonic() - started, count - fold - 1, count / (count - 1)
                one = used / (fold + 1)  # a fold's seconds; the training on everything takes `last` times as long
                if recipe.epochs and rest and plan.too_slow(name, used, one * (rest + last), one * (count + last)):
                    return None
    finally:
        plan.spend(name, time.monotonic() - started)
    return _gather(setting, recipe, parts, plan.spent[name])


def _gather(setting: Setting, recipe: Recipe, parts: list[tuple[np.ndarray, np.ndarray]], seconds: float) -> Tried:
    """parts: of every fold its frames and their logits at every stop."""
    name, stops = _name(setting, recipe), _stops(recipe)
    items, best, logits = [], (-np.inf, 0), None
    for i in range(len(stops)):
        whole = np.zeros((len(setting.pixels.images), *parts[0][1].shape[2:]), parts[0][1].dtype)
        for frames, out in parts:
            whole[frames] = out[i]
        items.append(item_scores(setting.problem, whole, setting.pixels))
        reached = scores.value(setting.problem, setting.found.targets, items[-1])
        if reached > best[0]:
            best, logits = (reached, i), whole
    return Tried(name, setting, recipe, stops, logits, np.stack(items), best[1], seconds)


def _stops(recipe: Recipe) -> list[float]:
    if not recipe.epochs:
        return list(SHRINKAGE)
    every = -(-recipe.epochs // CHECKS)
    return [float(e) for e in range(1, recipe.epochs + 1) if e % every == 0 or e == recipe.epochs]


def fold_logits(
    setting: Setting, recipe: Recipe, folds: np.ndarray, fold: int, progress
) -> tuple[np.ndarray, np.ndarray]:
    """The frames of a fold, int (n,), and their logits at every stop, (stops, n, ...), from the other folds."""
    cache, bar = progress
    backbone, pixels = setting.backbone, setting.pixels
    items = np.flatnonzero(folds != fold)
    assert not set(setting.found.groups[items]) & set(setting.found.groups[folds == fold])
    frames = pixels.frames_of(np.flatnonzero(folds == fold))
    described = ["tuned", *backbone.key, pixels.key, asdict(recipe), setting.seed]

    def make():
        if not recipe.epochs:
            x = frozen_features(setting, cache)
            train = pixels.frames_of(items)
            heads = [fit_head(setting, x, train, c) for c in _stops(recipe)]
            return {"logits": np.stack([x[0][frames] @ w.T + b for w, b in heads]).astype(np.float32)}
        stops, out = _stops(recipe), []

        def check(epoch, model):
            bar.update()
            if epoch in stops:
                out.append(network.predict(model, setting, frames))

        network.train(setting, recipe, items, recipe.epochs, check)
        return {"logits": np.stack(out)}

    return frames, cached(cache, [*described, folds.tolist(), fold], make)["logits"]


def frozen_features(setting: Setting, cache: Path) -> np.ndarray:
    """`frozen.mirrored_features` of a frozen backbone, kept in `cache`."""
    backbone = setting.backbone
    described = ["frozen", *backbone.key, setting.pixels.key]
    make = partial(frozen.mirrored_features, backbone, setting.pixels, setting.device)
    return cached(cache, described, lambda: {"x": make()})["x"]


def fit_head(setting: Setting, x: np.ndarray, frames: np.ndarray, c: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights and bias of a linear head on frozen features of `frames`, with the shrinkage 1 / c."""
    item = setting.pixels.item[frames]
    target = setting.problem.encode(setting.found.targets)[item]
    return frozen.fit(setting.problem, x[:, frames], target, 1 / np.bincount(item)[item], c)


def _cost(setting: Setting, recipe: Recipe, folds: np.ndarray) -> dict[int, tuple[float, float]]:
    """Epochs -> seconds of all folds, and of a training on everything, from a few steps."""
    trained, looked = network.seconds(setting, recipe)
    parts = [network.in_epoch(setting, np.flatnonzero(folds != fold)) for fold in range(folds.max() + 1)]
    whole, result = network.in_epoch(setting, np.arange(len(folds))), {}
    for epochs in EPOCHS:
        looks = len(_stops(replace(recipe, epochs=epochs))) * len(setting.pixels.images) * looked
        result[epochs] = epochs * sum(parts) * trained + looks, epochs * whole * trained
    return result


# --------------------------------------------------------------------------------------------------------- choice


def choose(tried: list[Tried]) -> Tried:
    return max(tried, key=lambda t: _value(t, t.best))


def optimism(tried: list[Tried], chosen: Tried, folds: np.ndarray) -> float:
    """By how much the choice's own score is too good for having been chosen by it, estimated by choosing again.

    In each fold, the choice's score less that of what the other folds alone would have chosen; the mean over folds.
    Scores are compared within a fold only, because outputs of different recipes have different scales.
    """
    lost = []
    for fold in range(folds.max() + 1):
        own, rest = folds == fold, folds != fold
        candidates = [(_value(t, stop, rest), t, stop) for t in tried for stop in range(len(t.stops))]
        _, other, stop = max(candidates, key=lambda c: c[0])
        lost.append(_value(chosen, chosen.best, own) - _value(other, stop, own))
    return float(np.nanmean(lost)) if np.isfinite(lost).any() else 0.0


def train_on_all(tried: Tried, plan: Plan, cache: Path) -> torch.nn.Module:
    """The chosen recipe on every item, up to the stop that the folds chose; eval mode, on the CPU."""
    setting, recipe, started = tried.setting, tried.recipe, time.monotonic()
    everything = np.arange(len(setting.found.targets))
    if not recipe.epochs:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(setting.seed)
            model = network.build(setting.backbone, setting.problem)
        frozen.install(
            model, *fit_head(setting, frozen_features(setting, cache), np.arange(len(setting.pixels.item)), tried.stop)
        )
    else:
        with tqdm(total=int(tried.stop), desc="training on everything", unit="epoch", leave=False) as bar:
            model = network.train(setting, recipe, everything, int(tried.stop), lambda *_: bar.update())
    plan.spend("training on everything", time.monotonic() - started)
    return model.cpu().eval()
