"""What CMW-Net learned, and which clips to look at: `python training/explain.py RUN [--suspects 50]`.

Draws pairs of a finished training's clips as its steps do, weighs them with its CMW-Net, and relates the weights to the
clips' sources, to the distance between the pair's frames and to the similarity of its representations. Prints Markdown
and writes RUN/figures/explain.png; the interval of a correlation is a bootstrap over groups of clips.

--suspects N instead lists the N clips whose pairs look most wrong (cuts, black frames, another organ), after a training
by any contrastive method: RUN/suspects.csv, and RUN/figures/suspects.png with each one's most suspicious pair.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from scipy.stats import rankdata  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from training import config as configs  # noqa: E402
from training import distributed  # noqa: E402
from training.config import training_pairs  # noqa: E402
from training.data import batches, faults  # noqa: E402
from training.data.dataset import prepare  # noqa: E402
from training.engine.state import restore  # noqa: E402
from training.engine.train import build, learner_of  # noqa: E402
from training.evaluation import (
    intervals,  # noqa: E402
    report,  # noqa: E402
    suspects,  # noqa: E402
    wrong_pairs,  # noqa: E402
)
from training.evaluation.datasets import EvaluationError  # noqa: E402
from training.messages import command  # noqa: E402
from training.method.networks import input_channels  # noqa: E402
from training.method.step import forward  # noqa: E402
from training.method.weighting import scores  # noqa: E402
from uscl_hub.files import write_whole  # noqa: E402

DRAWS = 1000
PAIRS = 16  # of a clip, at least, for the list of suspects


@torch.no_grad()
def weigh_pairs(state, clips, config, count, device, among=None):
    """Pairs of the training clips as in training (batch statistics, augmentation), `count` times optim.batch.

    Where the training made pairs wrong (pairs.corrupt), so are these. among: other clips than those of the training.

    Returns a dict of arrays (pairs,): clip, similarity (cosine, of the representations), loss, distance (frames from
    the pair's first to its last one), fault ('' for right pairs), weight (where the training has weights), and views,
    uint8 (pairs, 2, S, S), before augmentation.
    """
    learner, rows, among = learner_of(state, config), [], clips.train if among is None else among
    pairs, wrong = training_pairs(config), faults.plant(clips.cache, clips.train, config.pairs, config.seed)
    for i in range(count):
        chosen = batches.train_clips(among, i, config.optim.batch, config.seed)
        key = (config.seed, batches.EXPLAIN, i)
        batch = batches.make_batch(clips.cache, chosen, pairs, key, faults=wrong)
        before = {k: b.clone() for k, b in state.encoder.named_buffers()}
        h, z = forward(state.encoder, batch.views(device, config.model.size, input_channels(state.encoder)))[:2]
        for k, b in state.encoder.named_buffers():
            b.copy_(before[k])  # the running statistics are the training's
        similarity, losses = (x.cpu().numpy() for x in scores(learner, h, z))
        row = {"clip": chosen, "similarity": similarity, "loss": losses, "distance": batch.about.distance.numpy()}
        row["fault"] = np.array(batch.faults or [""] * len(chosen), object)
        weights = learner.weigh(h, z, batch.about.to(device))
        if weights is not None:
            row["weight"] = weights.cpu().numpy()
        row["views"] = torch.einsum("nvk,nkhw->nvhw", batch.mix, batch.frames.float()).round().byte().numpy()
        rows.append(row)
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def list_suspects(run, pairs, names, count, by):
    """Write RUN/suspects.csv and RUN/figures/suspects.png. Returns Markdown.

    Args:
        run: the training's folder; pairs: of `weigh_pairs`; names: every cached clip's id.
        count: clips to list; by: one of `suspects.RANKINGS`.
    """
    found = suspects.by_clip(pairs)
    rows = suspects.order(found, by)[:count]
    suspects.write_csv(run / "suspects.csv", found, rows, names)
    worst = []  # the clip's most suspicious pair
    for clip in found["clip"][rows]:
        own = np.flatnonzero(pairs["clip"] == clip)
        worst.append(own[np.argmin(suspects.RANKINGS[by] * pairs[by][own])])
    titles = [f"{rank} {names[clip]}" for rank, clip in enumerate(found["clip"][rows], start=1)]
    suspects.write_sheet(run / "figures" / "suspects.png", pairs["views"][worst], titles)
    lines = [[rank, names[found["clip"][row]], f"{found[by][row]:.4f}"] for rank, row in enumerate(rows[:10], start=1)]
    text = f"{report.table(['rank', 'clip', f'mean {by}'], lines)}\n\nAll {len(rows)}: {run / 'suspects.csv'}"
    if not any(found["fault"]):
        return text
    quality = suspects.quality(found, count)
    kinds = list(next(iter(quality.values()))["kinds"])
    lines = [
        [name, *(f"{q[k]:.3f}" for k in ("precision", "recall", "average_precision", "auroc")), *q["kinds"].values()]
        for name, q in quality.items()
    ]
    lines = [[*line[:5], *(f"{share:.2f}" for share in line[5:])] for line in lines]
    head = ["ranking", f"precision at {count}", f"recall at {count}", "average precision", "AUROC"]
    head += [f"found of {kind}" for kind in kinds]
    planted = int((found["fault"] != "").sum())
    return f"{text}\n\n{planted} of {len(found['clip'])} clips have planted faults:\n\n{report.table(head, lines)}"


def correlation(x, y, groups):
    """Spearman's rank correlation with the interval of a bootstrap over groups: an `intervals.Estimate`."""
    x, y = rankdata(x), rankdata(y)
    _, group = np.unique(groups, return_inverse=True)
    counts = intervals.draw_groups(group.max() + 1, DRAWS, 0)[:, group]
    return intervals.Estimate(_pearson(x, y, np.ones((1, len(x))))[0], _pearson(x, y, counts))


def _pearson(x, y, weights):
    total = weights.sum(1, keepdims=True)
    x, y = (v - weights @ v[:, None] / total for v in (x, y))  # (draws, n)
    with np.errstate(invalid="ignore"):  # a constant has no correlation: nan
        return (weights * x * y).sum(1) / np.sqrt((weights * x * x).sum(1) * (weights * y * y).sum(1))


def describe(pairs, sources, groups):
    """Markdown: weights by source, and within each source by thirds of the distance; correlations."""
    source, group = np.asarray(sources)[pairs["clip"]], np.asarray(groups)[pairs["clip"]]
    lines, relations = [], []
    for name in ["all", *sorted(set(source))]:
        chosen = np.ones(len(source), bool) if name == "all" else source == name
        part = {key: value[chosen] for key, value in pairs.items()}
        edges = np.quantile(part["distance"], [1 / 3, 2 / 3])
        third = np.digitize(part["distance"], edges, right=True)
        cells = [
            f"{part['weight'][third == i].mean():.4f} ({part['distance'][third == i].mean():.0f})"
            if (third == i).any()
            else "–"
            for i in range(3)
        ]
        w = part["weight"]
        lines.append([name, len(w), f"{w.mean():.4f}", f"{w.std():.4f}", f"{w.min():.4f} ... {w.max():.4f}", *cells])
        row = [name]
        for other in ("similarity", "distance"):
            if len(set(group[chosen])) < 2:
                row.append("one group: no interval")
                continue
            e = correlation(w, part[other], group[chosen])
            row.append("–" if np.isnan(e.value) else f"{e.value:+.2f} [{e.low:+.2f}, {e.high:+.2f}]")
        relations.append(row)
    head = ["source", "pairs", "mean weight", "sd", "range", "near: mean (frames apart)", "middle", "far"]
    return "\n\n".join(
        [
            report.table(head, lines),
            "Spearman's rank correlation of a pair's weight with the cosine similarity of its two representations and "
            "with its frames' distance, 95 % interval over groups:",
            report.table(["source", "with similarity", "with distance"], relations),
        ]
    )


def plot(pairs, sources, path):
    """Weight against similarity and against frame distance, coloured by source."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    source = np.asarray(sources)[pairs["clip"]]
    for axis, other in zip(axes, ("similarity", "distance")):
        for name in sorted(set(source)):
            axis.plot(pairs[other][source == name], pairs["weight"][source == name], ".", ms=3, alpha=0.5, label=name)
        axis.set_xlabel({"similarity": "cosine similarity", "distance": "frames apart"}[other])
    axes[0].set_ylabel("weight of the pair")
    axes[0].legend()
    figure.tight_layout()
    write_whole(path, partial(figure.savefig, dpi=110))
    plt.close(figure)


def open_run(run):
    """Config, clips and state of a finished contrastive training. Raises EvaluationError."""
    if not (run / "checkpoint.pt").is_file() or not (run / "config.yaml").is_file():
        raise EvaluationError(f"{run}: holds no training (checkpoint.pt and config.yaml)")
    config = configs.load(configs.Config, run / "config.yaml")
    if config.method == "distil":
        raise EvaluationError(f"{run}: was trained by distil, which has no pairs")
    clips = prepare(config, run)
    state = build(config, clips, torch.device("cpu"))
    restore(state, run / "checkpoint.pt")
    return config, clips, state


def find_suspects(run, count=50, by="loss"):
    """Print and return the Markdown of `list_suspects` for a finished contrastive training. Raises EvaluationError."""
    run, device = Path(run), distributed.setup("cpu")
    config, clips, state = open_run(run)
    among = np.sort(np.concatenate([clips.train, clips.meta, clips.val]))
    pairs = weigh_pairs(state, clips, config, -(-PAIRS * len(among) // config.optim.batch), device, among)
    if by not in pairs:
        raise EvaluationError(f"{run}: was trained by {config.method}, which has no weights: --by similarity or loss")
    text = list_suspects(run, pairs, clips.cache.ids, count, by)
    print(text)
    return text


def main(run, batches=60, model_card=None, section="weights"):
    """Print, draw and return the Markdown of a finished Meta-USCL training. Raises EvaluationError."""
    run, device = Path(run), distributed.setup("cpu")
    config, clips, state = open_run(run)
    if config.method != "meta_uscl":
        raise EvaluationError(f"{run}: was trained by {config.method}, which has no CMW-Net")
    pairs = weigh_pairs(state, clips, config, batches, device)
    sources = [clips.public[s] for s in clips.cache.sources]
    text = describe(pairs, sources, clips.groups)
    if (logged := wrong_pairs.read(run / "log.jsonl")) is not None:
        text += f"\n\n{wrong_pairs.describe(logged, sources)}"
    plot(pairs, sources, run / "figures" / "explain.png")
    if model_card:
        name = f"`python training/explain.py {run.name} --model-card {Path(model_card).name}`"
        report.replace_section(Path(model_card), section, f"{name}; {state.step} steps, seed {config.seed}.\n\n{text}")
    print(text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="output folder of training/run.py")
    parser.add_argument("--batches", type=int, default=60, help="batches of optim.batch pairs (default: 60)")
    parser.add_argument("--model-card", help="a model card whose section between results:weights markers is replaced")
    parser.add_argument("--suspects", type=int, help="list so many clips to look at, instead")
    parser.add_argument("--by", choices=suspects.RANKINGS, default="loss", help="what ranks the suspects")
    args = parser.parse_args()
    if args.suspects is not None and args.suspects < 1:
        parser.error("--suspects: at least 1")
    if args.suspects:
        command(lambda: find_suspects(args.run, args.suspects, args.by) and None, prefix="explain.py: ")
    else:
        command(lambda: main(args.run, args.batches, args.model_card) and None, prefix="explain.py: ")
