"""Turn a finished training into a released checkpoint: `python training/release.py --run RUN --tag TAG ...`.

Reads RUN/export, RUN/manifest.json and RUN/log.jsonl. Writes to uscl_hub/weights/ the weights (fp16 unless told),
a JSON file with the full provenance (settings, a line a clip with hash and licence, code commit, seed, curves) and the
registry's entry. With --results, figures that training/evaluate.py measured of this tag go into the entry.
"""

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from training import config as configs  # noqa: E402
from training.evaluation.report import NAMES  # noqa: E402
from training.messages import command, one_line  # noqa: E402
from uscl_hub import registry  # noqa: E402
from uscl_hub.checkpoints import (  # noqa: E402
    WEIGHTS_NAME,
    CheckpointError,
    check_folder,
    load_tensors,
    save_tensors,
    sha256,
)
from uscl_hub.files import write_json, write_whole  # noqa: E402
from uscl_hub.tensors import not_finite  # noqa: E402

MAX_BYTES = 25_000_000  # of a file in the wheel
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Release:
    """Release a training's weights with the package."""

    run: str = ""
    """Output folder of training/run.py."""
    tag: str = ""
    """The name after the dot: meta_uscl_resnet18.TAG."""
    licence: str = ""
    """Of the weights, a Hub licence id such as cc-by-4.0: at least what the data's licences ask for."""
    data: str = ""
    """What it was trained on, in one line."""
    dtype: str = "fp16"
    """fp16 or fp32."""
    default: bool = False
    """Put it first: what pretrained=True takes."""
    wheel: bool = True
    """False: only in the repository; name the file in setup.cfg under options.exclude_package_data, too."""
    results: tuple[str, ...] = ()
    """results.json files of training/evaluate.py with this tag among the backbones; the registry gets its figures."""


def main(settings: Release, weights: Path = registry.WEIGHTS) -> str:
    """Write the release into `weights` and return its name. Raises CheckpointError, naming what is missing or wrong."""
    for name in ("run", "tag", "licence", "data"):
        if not getattr(settings, name):
            raise CheckpointError(f"--{name}: is needed")
    if not settings.tag.isidentifier():
        raise CheckpointError(f"--tag: letters, digits and _ only, not {settings.tag!r}")
    if settings.dtype not in DTYPES:
        raise CheckpointError(f"--dtype: one of {', '.join(DTYPES)}, not {settings.dtype!r}")
    run = Path(settings.run)
    config = check_folder(run / "export")
    architecture = registry.our_name(config["architecture"])
    if architecture not in registry.ARCHITECTURES:
        ours = ", ".join(known.timm for known in registry.ARCHITECTURES.values())
        raise CheckpointError(f"{run}: {config['architecture']} is none of {ours}")
    name = f"{architecture}.{settings.tag}"
    provenance = complete_provenance(run, config.get("uscl_hub") or {})
    metrics = dict(figure for path in settings.results for figure in figures_of(name, Path(path)))

    state = load_tensors(run / "export" / WEIGHTS_NAME)
    state = {k: v.to(DTYPES[settings.dtype]) if v.is_floating_point() else v for k, v in state.items()}
    if bad := not_finite(state):
        raise CheckpointError(f"{run}: {bad[0]} is not finite in {settings.dtype}; use --dtype fp32")
    file = weights / f"{name}.safetensors"

    def save(path: Path) -> None:  # an older file of this name stays where this one is refused
        save_tensors(state, path)
        if settings.wheel and (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{name}: {size / 1e6:.1f} MB are too much for the wheel ({MAX_BYTES / 1e6:.0f} MB)")

    write_whole(file, save)
    write_json(weights / f"{name}.json", provenance, indent=0)

    entries = json.loads((weights / "registry.json").read_text(encoding="utf-8"))
    entry = {
        "file": file.name,
        "sha256": sha256(file),
        "px": config["pretrained_cfg"]["input_size"][-1],
        "licence": settings.licence,
        "data": settings.data,
        "metrics": metrics,
        "hub_id": None,
        **({} if settings.wheel else {"wheel": False}),
    }
    first = {name: entry} if settings.default else {}
    entries = {**first, **entries, name: entry}
    write_json(weights / "registry.json", entries, indent=2)
    return name


def complete_provenance(run: Path, provenance: dict) -> dict:
    """The export's provenance with the manifest, each clip with its licence, and the curves of the training."""
    if not {"sources", "manifest_sha256"} <= provenance.keys():
        raise CheckpointError(f"{run / 'export'}: its config.json does not say what it was trained on: not released")
    licences = {source["name"]: source["licence"] for source in provenance["sources"]}
    if unknown := [source for source, licence in licences.items() if licence == "not stated"]:
        raise CheckpointError(f"{run}: no licence is stated for {', '.join(unknown)} (data.licences): not released")
    text = _read(run / "manifest.json")
    if hashlib.sha256(text.encode()).hexdigest() != provenance["manifest_sha256"]:
        raise CheckpointError(f"{run / 'manifest.json'}: is not that of the export")
    log = [json.loads(line) for line in _read(run / "log.jsonl").splitlines()]
    steps = [row for row in log if "loss" in row]
    return {
        **provenance,
        "manifest": [{**clip, "licence": licences[clip["source"]]} for clip in json.loads(text)],
        "curves": {
            "training": [{k: row[k] for k in ("step", "loss", "meta_loss") if k in row} for row in steps[::10]],
            "validation": [row for row in log if "val_loss" in row],
        },
    }


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({one_line(error)})") from error


def figures_of(name: str, path: Path) -> list[tuple[str, float]]:
    """(name, value) of what an evaluation with all labels measured of `name`, by item, not by frame.

    Raises CheckpointError if the file is no results.json of training/evaluate.py.
    """
    found = []
    try:
        result = json.loads(_read(path))
        specs = {backbone: about["spec"] for backbone, about in result["backbones"].items()}
        for row in result["results"]:
            if specs[row["backbone"]] == name and row["fraction"] == 1 and row["level"] != "frame":
                metric = next(m for m in ("macro-F1", "Dice") if m in row["metrics"])
                title = f"{row['task']} {metric}, {NAMES[row['protocol']]}"
                found.append((title, round(row["metrics"][metric]["value"], 4)))
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"{path}: is not a results.json of training/evaluate.py ({why})") from error
    return found


if __name__ == "__main__":
    settings = configs.cli(Release, __doc__)
    command(lambda: print(main(settings)), prefix="release.py: ")
