"""README's learning curves: `python docs/learning_curves.py RESULTS.json... [-o docs/learning_curves.png]`.

Draws the linear probe's macro-F1 by the number of labelled files, a panel a task and a line a backbone, with 95 %
intervals, from the results.json of `python training/evaluate.py --fractions 25 50 100 200`.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PROTOCOL, METRIC = "linear", "macro-F1"


def rows(paths: list[Path]) -> tuple[dict[str, str], list[dict]]:
    """Titles of the tasks and the rows of their items (not frames) in all files."""
    titles, found = {}, []
    for path in paths:
        result = json.loads(path.read_text(encoding="utf-8"))
        titles |= {name: task["title"] for name, task in result["tasks"].items()}
        found += [r for r in result["results"] if r["protocol"] == PROTOCOL and r["level"] != "frame"]
    return titles, sorted(found, key=lambda row: row["fraction"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/learning_curves.png"))
    args = parser.parse_args()
    titles, found = rows(args.results)
    backbones = list(dict.fromkeys(row["backbone"] for row in found))
    figure, axes = plt.subplots(1, len(titles), figsize=(3.1 * len(titles), 3.6), squeeze=False, layout="constrained")
    for axis, (task, title) in zip(axes.flat, titles.items()):
        for i, backbone in enumerate(backbones):
            line = [row for row in found if (row["task"], row["backbone"]) == (task, backbone)]
            scores = [row["metrics"][METRIC] for row in line]
            x = [row["fraction"] * 1.04 ** (i - len(backbones) / 2) for row in line]  # beside each other
            below, above = ([100 * abs(s["value"] - s[end]) for s in scores] for end in ("low", "high"))
            values = [100 * s["value"] for s in scores]
            axis.errorbar(x, values, yerr=[below, above], marker="o", markersize=4, capsize=2, label=backbone)
        counts = sorted({row["fraction"] for row in found if row["task"] == task})
        axis.set_xscale("log")
        axis.set_xticks(counts, [f"{count:g}" for count in counts])
        axis.minorticks_off()
        axis.set(xlabel="labelled files")
        axis.set_title(title, fontsize=10)
    axes.flat[0].set_ylabel(f"{METRIC} (%)")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(args.output, dpi=100)
    print(f"{args.output}: {len(found)} points of {len(titles)} tasks")


if __name__ == "__main__":
    main()
