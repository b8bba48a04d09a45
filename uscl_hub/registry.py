"""What is ours: the architectures, the released checkpoints, and their pretrained_cfgs in timm's format.

Released checkpoints are listed in weights/registry.json, keyed by their timm name; the first one of an architecture is
what pretrained=True takes. training/release.py writes a release: the weights' file, NAME.json with their provenance,
and an entry:

    "meta_uscl_resnet18.<tag>": {
        "file": "meta_uscl_resnet18.<tag>.safetensors",   (in weights/; null if it is on the Hub only)
        "sha256": "<of that file>", "px": 112, "licence": "cc-by-4.0",
        "data": "<what it was trained on>", "metrics": {"<task>": 0.0}, "hub_id": "org/name" (or null),
        "wheel": false,   (only where the file is in the repository and not in the wheel)
        "mean": 0.18, "std": 0.24   (only where they are not the architecture's)}
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from uscl_hub.preprocess import MEAN, STD

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Architecture:
    """One of our models: a network of timm, same modules and same state-dict names, for ultrasound.

    timm: its name there, by which exports are known, so that timm loads them without this package.
    px, mean, std: input size and normalisation where no checkpoint says otherwise.
    """

    timm: str
    px: int = 64
    mean: float = MEAN
    std: float = STD


# To add one: a row here, a function in models.py and one in hubconf.py.
ARCHITECTURES = {
    "meta_uscl_resnet18": Architecture("resnet18"),
    "meta_uscl_resnet34": Architecture("resnet34"),
    "meta_uscl_resnet50": Architecture("resnet50"),
    "meta_uscl_efficientnet_lite0": Architecture("tf_efficientnet_lite0"),
}
DEFAULT = "meta_uscl_resnet18"


def plain_name(name: str) -> str:
    """timm's architecture of a model name: 'meta_uscl_resnet18.nc' -> 'resnet18', 'vit_tiny.x' -> 'vit_tiny'.

    >>> plain_name("meta_uscl_resnet18.nc"), plain_name("vit_tiny_patch16_224")
    ('resnet18', 'vit_tiny_patch16_224')
    """
    architecture = name.partition(".")[0]
    return ARCHITECTURES[architecture].timm if architecture in ARCHITECTURES else architecture


def our_name(architecture: str) -> str:
    """The reverse: 'resnet18' -> 'meta_uscl_resnet18'; what is none of ours stays as it is.

    >>> our_name("resnet18"), our_name("convnext_atto")
    ('meta_uscl_resnet18', 'convnext_atto')
    """
    return next((name for name, ours in ARCHITECTURES.items() if ours.timm == architecture), architecture)


def releases() -> dict[str, dict]:
    """Released checkpoints by timm name ('meta_uscl_resnet18.<tag>'), in order of preference.

    >>> name, release = next(iter(releases().items()))
    >>> name.startswith("meta_uscl_"), release["px"] > 0, len(release["sha256"])
    (True, True, 64)
    """
    return json.loads((WEIGHTS / "registry.json").read_text(encoding="utf-8"))


def provenance(name: str) -> dict | None:
    """What weights/NAME.json says of a release's training: method, config, sources, manifest, ...; None without it.

    >>> known = provenance(next(iter(releases())))
    >>> sorted({"method", "steps", "sources", "groups"} & set(known))
    ['groups', 'method', 'sources', 'steps']
    >>> provenance("meta_uscl_resnet18.absent") is None
    True
    """
    path = WEIGHTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if name in releases() and path.is_file() else None


def make_cfg(
    px: int = 64, mean: float = MEAN, std: float = STD, *, channels: int = 3, architecture: str = "resnet18", **extra
) -> dict:
    """A full pretrained_cfg in timm's format, for features of square grey inputs.

    What is left out of one, timm would fill in from its own checkpoint's. architecture: timm's name; px: pixels of a
    side; mean, std: of images in [0, 1], the same in all channels; extra: further keys, or other values.

    >>> cfg = make_cfg(112)
    >>> cfg["input_size"], cfg["mean"], cfg["interpolation"]
    ((3, 112, 112), (0.18, 0.18, 0.18), 'bilinear')
    """
    timms = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    return {
        "num_classes": 0,
        "input_size": (channels, px, px),
        "pool_size": (-(-px // 32),) * 2 if timms and timms.pool_size else None,
        "fixed_input_size": bool(timms and timms.fixed_input_size),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": (mean,) * channels,
        "std": (std,) * channels,
        "first_conv": timms and timms.first_conv,
        "classifier": timms and timms.classifier,
        "origin_url": "https://github.com/Schuture/Meta-USCL",
        "paper_name": "Generating and Weighting Semantically Consistent Sample Pairs for Ultrasound "
        "Contrastive Learning",
        "paper_ids": "arXiv:2212.04097",
        **extra,
    }


def pretrained_cfgs() -> dict[str, Any]:
    """timm name -> pretrained_cfg of every release, and of every architecture that has none.

    >>> pretrained_cfgs()["meta_uscl_resnet34"]["input_size"]
    (3, 64, 64)
    """
    entries = releases()
    cfgs = {name: _release_cfg(name, entry) for name, entry in entries.items()}
    released = {name.partition(".")[0] for name in entries}
    for name, ours in ARCHITECTURES.items():
        if name not in released:
            cfgs[name] = make_cfg(ours.px, ours.mean, ours.std, architecture=ours.timm, license="apache-2.0")
    return cfgs


def _release_cfg(name: str, entry: dict) -> dict:
    ours = ARCHITECTURES[name.partition(".")[0]]
    source: dict = {}
    if entry.get("file"):
        source["file"] = str(WEIGHTS / entry["file"])
    if entry.get("hub_id"):
        source.update(hf_hub_id=entry["hub_id"], hf_hub_filename="model.safetensors")
    return make_cfg(
        entry["px"],
        entry.get("mean", ours.mean),
        entry.get("std", ours.std),
        architecture=ours.timm,
        license=entry["licence"],
        description=entry.get("data"),
        **source,
    )
