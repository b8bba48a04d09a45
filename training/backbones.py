"""Backbones by name, for evaluation: random, timm, ours, or a folder; and what they were pretrained on."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

from training.tasks import Task, sha256
from uscl_hub.preprocess import MEAN, STD


class LeakError(Exception):
    """A backbone was pretrained on clips of the patients it is to be tested on."""


@dataclass
class Backbone:
    """model: eval mode, images (B, 3, px, px) -> features (B, d). px: its own input size, None if untrained.
    sha: of the weights. provenance: `uscl_hub` of the folder's config.json, None if it has none."""

    name: str
    spec: str
    model: nn.Module
    architecture: str
    px: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha: str
    provenance: dict | None


def split_name(spec: str) -> tuple[str, str]:
    """'name=spec' -> (name, spec); 'spec' -> (spec, spec), a folder by its last part."""
    if "=" in spec:
        name, spec = spec.split("=", 1)
        return name, spec
    return (Path(spec).name if Path(spec).is_dir() else spec), spec


def is_random(spec: str) -> bool:
    spec = split_name(spec)[1]
    return spec.startswith("random:") or spec.startswith("timm:") and not spec.endswith(":pretrained")


def load_backbone(spec: str, seed: int = 0, px: int | None = None) -> Backbone:
    """spec: random:NAME, timm:NAME (random too), timm:NAME:pretrained, meta_uscl_NAME[.tag], or an exported or
    converted folder; 'label=' before it names it in the report. seed: of random weights. px: for architectures of
    one fixed input size. Raises ValueError for any other spec.
    """
    name, spec = split_name(spec)

    def create(architecture, **kwargs):
        known = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
        fixed = {"img_size": px} if px and known is not None and known.fixed_input_size else {}
        return timm.create_model(architecture, num_classes=0, **fixed, **kwargs)

    provenance = None
    if is_random(spec):
        architecture = spec.split(":", 1)[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = create(architecture)
        px, mean, std = None, (MEAN,) * 3, (STD,) * 3
    else:
        if spec.startswith("timm:"):
            model = create(spec.split(":")[1], pretrained=True)
        elif spec.startswith("meta_uscl_"):
            import uscl_hub

            model = uscl_hub.load_meta_uscl_backbone(spec)
            provenance = getattr(model, "provenance", None)
        elif Path(spec).is_dir():
            config = Path(spec) / "config.json"
            if not config.is_file():
                raise ValueError(
                    f"{spec}: no config.json in it; a backbone folder is what run.py's export or "
                    "'uscl-hub convert' writes"
                )
            provenance = json.loads(config.read_text(encoding="utf-8")).get("uscl_hub")
            model = timm.create_model(f"local-dir:{Path(spec).resolve()}", pretrained=True, num_classes=0)
        else:
            raise ValueError(
                f"backbone {spec!r} is neither a folder nor random:NAME, timm:NAME, timm:NAME:pretrained "
                "or meta_uscl_NAME[.tag]"
            )
        cfg = model.pretrained_cfg
        px, mean, std, architecture = cfg["input_size"][-1], cfg["mean"], cfg["std"], cfg["architecture"]
    mean, std = (tuple(map(float, (v if isinstance(v, (tuple, list)) else (v,) * 3))) for v in (mean, std))
    return Backbone(name, spec, model.eval(), architecture, px, mean, std, weights_sha(model), provenance)


def weights_sha(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode() + str(value.dtype).encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def fingerprint(name: str) -> str:
    """How an export names a group (training/export.py): without giving its name away."""
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def find_leaks(backbone: Backbone, task: Task) -> list[str]:
    """Groups of the task that the backbone was pretrained on: by group id (or its fingerprint) or a file's content.

    A group is known as the task names it ('covid_blues/patient_7'), by its aliases ('patient_7') and by its file's id.
    """
    known = backbone.provenance or {}
    groups, clips = set(map(str, known.get("groups") or ())), set(known.get("clips") or ())
    leaks = {}
    for item in task.items:
        names = {item.group, item.id, *item.aliases}
        if groups & (names | set(map(fingerprint, names))) or clips and clips & content_hashes(item.path):
            leaks[item.group] = None
    return list(leaks)


def content_hashes(path: Path) -> set[str]:
    """The file's sha256 and the frame cache's hash of a one-file clip (training/cache.py)."""
    digest = sha256(path)
    return {digest, hashlib.sha256(bytes.fromhex(digest)).hexdigest()}


def refuse_leaks(backbone: Backbone, task: Task):
    leaks = find_leaks(backbone, task)
    if leaks:
        raise LeakError(
            f"{backbone.name} was pretrained on {len(leaks)} of the {len(set(task.groups))} groups that "
            f"{task.title} tests ({', '.join(leaks[:5])}{', ...' if len(leaks) > 5 else ''}): its result "
            f"would mean nothing. Pretrain without them, or leave {task.name!r} out of --tasks, or pass "
            "--leaks skip to leave out just this pair and say so in the report"
        )
