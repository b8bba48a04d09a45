"""What CMW-Net learned: `python training/explain.py RUN [--model-card MODEL_CARD.md]`.

Draws pairs of a finished training's clips as its steps do, weighs them with its CMW-Net, and relates the weights to the
clips' sources, to the distance between the pair's frames and to the similarity of its representations. Prints Markdown
and writes RUN/figures/explain.png; the interval of a correlation is a bootstrap over groups of clips.
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
from training.data import batches  # noqa: E402
from training.data.dataset import prepare  # noqa: E402
from training.engine.state import restore  # noqa: E402
from training.engine.train import build  # noqa: E402
from training.evaluation import (
    intervals,  # noqa: E402
    report,  # noqa: E402
)
from training.evaluation.datasets import EvaluationError  # noqa: E402
from training.messages import command  # noqa: E402
from training.method.networks import input_channels  # noqa: E402
from training.method.step import forward  # noqa: E402
from uscl_hub.files import write_whole  # noqa: E402

DRAWS = 1000


@torch.no_grad()
def weigh_pairs(state, clips, config, count, device):
    """Pairs of the training clips as in training (batch statistics, augmentation), `count` times optim.batch.

    Returns a dict of arrays (pairs,): clip, weight, similarity (cosine, of the representations), distance (frames from
    the pair's first to its last one).
    """
    rows = []
    for i in range(count):
        chosen = batches.train_clips(clips.train, i, config.optim.batch, config.seed)
        key = (config.seed, batches.EXPLAIN, i)
        batch = batches.make_batch(clips.cache, chosen, config.pairs, key)
        numbers = batches.choose(clips.cache, chosen, config.pairs, np.random.default_rng(key))[0]
        before = {k: b.clone() for k, b in state.encoder.named_buffers()}
        h = forward(state.encoder, batch.views(device, config.model.size, input_channels(state.encoder)))[0]
        for k, b in state.encoder.named_buffers():
            b.copy_(before[k])  # the running statistics are the training's
        similarity = torch.cosine_similarity(h[0], h[1])
        rows.append([chosen, state.cmw(h).cpu(), similarity.cpu(), numbers.max(1) - numbers.min(1)])
    return dict(zip(("clip", "weight", "similarity", "distance"), map(np.concatenate, zip(*rows))))


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


def draw(pairs, sources, path):
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


def main(run, batches=60, model_card=None, section="weights"):
    """Print, draw and return the Markdown of a finished Meta-USCL training. Raises EvaluationError."""
    run = Path(run)
    if not (run / "checkpoint.pt").is_file() or not (run / "config.yaml").is_file():
        raise EvaluationError(f"{run}: holds no training (checkpoint.pt and config.yaml)")
    config = configs.load(configs.Config, run / "config.yaml")
    if config.method != "meta_uscl":
        raise EvaluationError(f"{run}: was trained by {config.method}, which has no CMW-Net")
    device = distributed.setup("cpu")
    clips = prepare(config, run)
    state = build(config, clips, device)
    restore(state, run / "checkpoint.pt")
    pairs = weigh_pairs(state, clips, config, batches, device)
    text = describe(pairs, [clips.public[s] for s in clips.cache.sources], clips.groups)
    draw(pairs, [clips.public[s] for s in clips.cache.sources], run / "figures" / "explain.png")
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
    args = parser.parse_args()
    command(lambda: main(args.run, args.batches, args.model_card) and None, prefix="explain.py: ")
