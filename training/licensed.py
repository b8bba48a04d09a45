"""Links to those files of POCUS lung whose licence allows it: `python training/licensed.py DATA/pocus_lung OUT ...`.

OUT becomes a folder that `data.roots` takes: patient_N/FILE (or source_N), so that clips and groups have the names by
which training/evaluate.py knows them and refuses a backbone that has seen the patients it is tested on.
"""

import argparse
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.evaluation.datasets import TaskError, read_csv  # noqa: E402
from training.messages import command, one_line  # noqa: E402


def link(root, out, licences, labels=()):
    """Link the files of `root` that file_index.csv gives one of `licences` (and of `labels`, if any are named).

    Returns the number of files of each licence. Raises TaskError: no index, an unknown licence or label, a file without
    a patient or source, or `out` has other files.
    """
    root, out = Path(root), Path(out)
    index = read_csv(root / "file_index.csv", ("path", "label", "licence", "patient_id", "source_id"))
    for what, wanted, known in (
        ("licence", licences, {row["licence"] for row in index}),
        ("label", labels, {row["label"] for row in index}),
    ):
        if unknown := sorted(set(wanted) - known):
            raise TaskError(f"no {what} {', '.join(unknown)} in file_index.csv; there are {', '.join(sorted(known))}")
    files = defaultdict(list)
    for path in sorted(root.rglob("*")):
        if path.is_file():
            files[path.stem.lower()].append(path)
    links, counts = {}, Counter()
    for row in index:
        found = files[Path(row["path"]).stem.lower()]
        if row["licence"] not in licences or (labels and row["label"] not in labels) or not found:
            continue
        if len(found) > 1:
            raise TaskError(f"{row['path']}: {len(found)} files have this name: {', '.join(map(str, found))}")
        if not (row["patient_id"] or row["source_id"]):
            raise TaskError(f"{row['path']}: file_index.csv gives neither patient_id nor source_id: unknown group")
        group = f"patient_{row['patient_id']}" if row["patient_id"] else f"source_{row['source_id']}"
        if not re.fullmatch(r"[\w.+-][\w .+-]*", group):  # a folder's name, and no path
            raise TaskError(f"{one_line(row['path'])}: {one_line(group)!r} in file_index.csv cannot be a folder's name")
        links[out / group / found[0].name] = found[0].resolve()
        counts[row["licence"]] += 1
    if strangers := [path for path in out.rglob("*") if not path.is_dir() and path not in links]:
        raise TaskError(f"{out}: has files that do not belong there, such as {strangers[0]}; choose another folder")
    for path, target in links.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.resolve() != out.resolve() / path.parent.name:
            raise TaskError(f"{path.parent}: is a link to another folder; remove it")
        if path.is_symlink() and Path(os.readlink(path)) != target:  # the data have moved
            path.unlink()
        if not path.is_symlink():
            os.symlink(target, path)
    return dict(counts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="the folder pocus_lung, with file_index.csv")
    parser.add_argument("out", type=Path, help="folder of links; name it pocus_lung")
    parser.add_argument("--licences", nargs="+", required=True, help="as in file_index.csv, such as 'CC BY 4.0'")
    parser.add_argument("--labels", nargs="+", default=(), help="only these; default: all")
    args = parser.parse_args()

    def main():
        counted = link(args.root, args.out, args.licences, args.labels)
        print(f"{args.out}: {', '.join(f'{n} {licence}' for licence, n in counted.items()) or 'no file'}")

    command(main, prefix="licensed.py: ")
