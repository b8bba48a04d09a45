"""The paper's ablation: `python training/ablate.py --config training/configs/ablation.yaml --train.data.roots DIR ...`.

Trains every arm with every seed at equal steps (training/run.py), evaluates all of them on the same folds
(training/evaluate.py) and writes one table. A finished training and a finished fold of the evaluation are kept, an
interrupted training goes on from its checkpoint: start it again to go on.
"""

import copy
import json
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import config as configs  # noqa: E402
from training import evaluate as evaluation  # noqa: E402
from training import run  # noqa: E402
from training.evaluation import report, wrong_pairs  # noqa: E402
from training.evaluation.task import EvaluationError  # noqa: E402
from training.messages import command  # noqa: E402
from uscl_hub.files import write_text  # noqa: E402
from uscl_hub.registry import plain_name  # noqa: E402


@dataclass
class AblateConfig:
    """Train and evaluate a list of arms."""

    arms: tuple[str, ...] = ("random", "simclr", "uscl/standard/3", "uscl/inner/3", "meta_uscl/standard/3")
    """'random', 'simclr', or METHOD/MODE/K: uscl or meta_uscl, standard or inner, frames that span a pair. meta_uscl
    also with /delayed, /everyN or /depthN, its cheaper options; /statistics, /by_source, see meta.input and
    meta.by_source; /shuffled, a control: each pair has another pair's weight. uscl also with /distance, see
    loss.weights. Both with /corruptN: N per cent of the training clips give wrong pairs. Several of them are joined by
    more slashes."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of training and evaluation."""
    out: str = "runs/ablation"
    """ablation.md, a training each arm and seed, evaluation/ with its report."""
    train: configs.Config = field(default_factory=configs.Config)
    """What all trainings share; method, pairs.mode, pairs.frames, seed, out and data.cache are set by the arm."""
    evaluate: evaluation.EvaluateConfig = field(default_factory=evaluation.EvaluateConfig)
    """How all are evaluated; backbones, seeds, out and cache are set."""


Config = AblateConfig  # its name up to version 0.1


def main(config: AblateConfig) -> Path:
    """Train what is missing, evaluate, and return the table's path. Raises EvaluationError or CheckpointError."""
    out = Path(config.out)
    backbones = {arm: f"{arm}=random:{plain_name(config.train.model.name)}" for arm in config.arms}
    trainings = {(arm, s): training(config, arm, s) for arm in config.arms for s in config.seeds if arm != "random"}
    if trainings and not config.train.data.roots:
        raise EvaluationError("train.data.roots: name the folders of clips to train on")
    backbones |= {arm: f"{arm}={out / 'training' / slug(arm)}-{{seed}}/export" for arm, _ in trainings}
    settings = replace(
        config.evaluate,
        backbones=tuple(backbones.values()),
        seeds=config.seeds,
        out=str(out / "evaluation"),
        cache=str(out / "evaluation_cache"),
    )
    settings = evaluation.with_tasks(settings)
    evaluation.check(settings)
    evaluation.load_tasks(settings)  # what cannot be evaluated is better known before the training
    for number, ((arm, seed), one) in enumerate(trainings.items(), start=1):
        print(f"training {number} of {len(trainings)}: {arm}, seed {seed}", flush=True)
        train(one)
    evaluation.main(settings)
    result = json.loads((out / "evaluation" / "results.json").read_text(encoding="utf-8"))
    text = table(result) + wrong(trainings)
    write_text(out / "ablation.md", text)
    print(text)
    return out / "ablation.md"


def slug(arm: str) -> str:
    return arm.replace("/", "-")


def training(config: AblateConfig, arm: str, seed: int) -> configs.Config:
    """The settings of one training. Raises EvaluationError for an arm that does not exist."""
    method = arm.partition("/")[0]
    one = copy.deepcopy(config.train)
    one.method, one.seed, one.out = method, seed, str(Path(config.out) / "training" / f"{slug(arm)}-{seed}")
    one.data.cache, one.resume = (str(Path(config.out) / "frames"),), True
    match = re.fullmatch(r"(meta_uscl|uscl)/(standard|inner)/([1-9]\d*)((?:/\w+)*)", arm)
    if match:
        one.pairs.mode, one.pairs.frames = match[2], int(match[3])
    known = match and all(option(one, name) for name in match[4].split("/")[1:])
    if one.meta.shuffle and (one.meta.delayed or one.meta.every > 1):  # a control of the exact step
        known = False
    if arm != "simclr" and not known:
        raise EvaluationError(
            f"arms: {arm!r} is not 'random', 'simclr', or like 'uscl/standard/3', 'meta_uscl/inner/2', "
            "'meta_uscl/standard/3/delayed'"
        )
    return one


def option(one: configs.Config, name: str) -> bool:
    """Set an arm's option. Returns whether its method has it."""
    kind, number = re.fullmatch(r"(\D*)(\d*)", name).groups()
    if kind == "corrupt" and 0 < int(number or 0) <= 100:
        one.pairs.corrupt = int(number) / 100
    elif name == "distance" and one.method == "uscl":
        one.loss.weights = "distance"
    elif one.method != "meta_uscl":
        return False
    elif kind in ("every", "depth") and int(number or 0) > 0:
        setattr(one.meta, kind, int(number))
    elif name == "statistics":
        one.meta.input = "statistics"
    elif name in ("delayed", "by_source", "shuffled"):
        setattr(one.meta, {"shuffled": "shuffle"}.get(name, name), True)
    else:
        return False
    return True


def train(one: configs.Config):
    """Train unless the very same training is finished."""
    folder = Path(one.out)
    if (folder / "config.yaml").is_file():
        before = configs.load(configs.Config, folder / "config.yaml")
        if before != one:
            raise EvaluationError(f"{folder}: holds a training with other settings; choose another --out or remove it")
        if (folder / "export" / "README.md").is_file():  # written last
            return
    run.main(one)
    if not (folder / "export" / "README.md").is_file():
        raise EvaluationError("stopped; start it again to go on")


def wrong(trainings) -> str:
    """Markdown of what the weights did with wrong pairs, where arms have some (/corruptN)."""
    logs: dict[str, list] = {}
    for (arm, _), one in trainings.items():
        if (pairs := wrong_pairs.read(Path(one.out) / "log.jsonl")) is not None:
            logs.setdefault(arm, []).append(pairs)
    if not logs:
        return ""
    return (
        "\nHow well a low weight, a low similarity or a high loss finds the pairs made wrong on purpose (a frozen "
        f"pair is more alike than a right one):\n\n{wrong_pairs.compare(logs)}\n"
    )


def table(result: dict) -> str:
    """Markdown: a line an arm, a column a task, protocol and share of labels; differences are from the first arm."""
    arms = list(result["backbones"])
    rows = [r for r in result["results"] if r["level"] != "frame"]
    keys = ("task", "protocol", "fraction")
    columns = list(dict.fromkeys(tuple(r[key] for key in keys) for r in rows))
    metric = {
        column: next(m for m in ("macro-F1", "Dice", "R2") if m in r["metrics"])
        for r in rows
        for column in [tuple(r[key] for key in keys)]
    }
    cells = {(r["backbone"], *(r[key] for key in keys)): r["metrics"] for r in rows}
    verdicts = {
        (d["backbone"], *(d[key] for key in keys)): {"better": " ▲", "worse": " ▼"}.get(d["verdict"], "")
        for d in result["differences"]
        if d["against"] == arms[0] and d["level"] != "frame" and d["metric"] == metric[tuple(d[key] for key in keys)]
    }

    def cell(arm, column):
        found = cells.get((arm, *column))
        return "–" if found is None else report.interval(found[metric[column]]) + verdicts.get((arm, *column), "")

    head = [
        f"{result['tasks'][task]['title']}, {report.NAMES[protocol]}, "
        f"{report.labels_kept(fraction)} of labels: {metric[column]} (%)"
        for column in columns
        for task, protocol, fraction in [column]
    ]
    steps = [result["backbones"][arm]["provenance"].get("steps", 0) for arm in arms]
    lines = [[arm, n, *(cell(arm, column) for column in columns)] for arm, n in zip(arms, steps)]
    seeds = ", ".join(map(str, result["config"]["seeds"]))
    return (
        f"# Ablation\n\nMethod/pairs/K; seeds {seeds}, pooled. ▲ better, ▼ worse than {arms[0]}: the 95 % interval of "
        "the paired difference excludes 0. The rest is in evaluation/report.html.\n\n"
        f"{report.table(['arm', 'steps', *head], lines)}\n"
    )


if __name__ == "__main__":
    settings = configs.cli(AblateConfig, __doc__)
    command(lambda: main(settings) and None, prefix="ablate.py: ")
