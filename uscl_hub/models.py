"""The timm models meta_uscl_resnet18, meta_uscl_resnet34 and meta_uscl_resnet50.

They are timm's own ResNets (same modules, same state-dict names) with ultrasound pretrained_cfgs. Without
num_classes they are feature extractors, as their checkpoints are: there is no classifier to load.

Released checkpoints are listed in weights/registry.json, keyed by their timm name; the first one of an
architecture is what pretrained=True takes. training/release.py writes a release: the weights' file, NAME.json with
their provenance, and an entry:

    "meta_uscl_resnet18.<tag>": {
        "file": "meta_uscl_resnet18.<tag>.safetensors",   (in weights/; null if it is on the Hub only)
        "sha256": "<of that file>", "px": 112, "licence": "cc-by-4.0",
        "data": "<what it was trained on>", "metrics": {"<task>": 0.0}, "hub_id": "org/name" (or null)}
"""

import json
from functools import partial
from pathlib import Path

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    split_model_name_tag,
)
from timm.models._builder import resolve_pretrained_cfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from uscl_hub.preprocess import MEAN, STD

WEIGHTS = Path(__file__).parent / "weights"
ARCHITECTURES = {  # ours -> timm's, by which exports are known so that timm loads them without this package
    "meta_uscl_resnet18": "resnet18",
    "meta_uscl_resnet34": "resnet34",
    "meta_uscl_resnet50": "resnet50",
}
PX = 64  # input size where no checkpoint says otherwise


def releases() -> dict[str, dict]:
    """Released checkpoints by timm name ('meta_uscl_resnet18.<tag>'), in order of preference."""
    return json.loads((WEIGHTS / "registry.json").read_text(encoding="utf-8"))


def provenance(name: str) -> dict | None:
    """What weights/NAME.json says of a release's training: method, config, sources, manifest, ...; None without it."""
    path = WEIGHTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if name in releases() and path.is_file() else None


def make_cfg(px: int = PX, mean: float = MEAN, std: float = STD, **extra) -> dict:
    """A full pretrained_cfg in timm's format, for an ultrasound backbone with square inputs of px pixels."""
    return {
        "num_classes": 0,
        "input_size": (3, px, px),
        "pool_size": (-(-px // 32),) * 2,
        "fixed_input_size": False,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": (mean,) * 3,
        "std": (std,) * 3,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        "origin_url": "https://github.com/Schuture/Meta-USCL",
        "paper_name": "Generating and Weighting Semantically Consistent Sample Pairs for Ultrasound "
        "Contrastive Learning",
        "paper_ids": "arXiv:2212.04097",
        **extra,
    }


def _release_cfg(entry: dict) -> dict:
    source = {}
    if entry.get("file"):
        source["file"] = str(WEIGHTS / entry["file"])
    if entry.get("hub_id"):
        source.update(hf_hub_id=entry["hub_id"], hf_hub_filename="model.safetensors")
    return make_cfg(entry["px"], license=entry["licence"], description=entry.get("data"), **source)


def _default_cfgs():
    cfgs = {name: _release_cfg(entry) for name, entry in releases().items()}
    released = {split_model_name_tag(name)[0] for name in cfgs}
    cfgs.update({name: make_cfg() for name in ARCHITECTURES if name not in released})
    return generate_default_cfgs(cfgs)


default_cfgs = _default_cfgs()


def _create(variant: str, pretrained: bool, **kwargs):
    if not pretrained:
        return build_model_with_cfg(ResNet, variant, False, **kwargs)
    # Find and check the file before timm reads it, then let timm load it in its own way. Whatever the
    # source, the weights are a safetensors file: timm alone would fall back to unpickling.
    from uscl_hub import checkpoints

    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    own = {"file": None, "hf_hub_id": None, "url": ""}
    if own.keys() & overlay.keys():  # what the caller names comes before the release's own sources
        overlay = {**own, **overlay}
    cfg = resolve_pretrained_cfg(variant, kwargs.pop("pretrained_cfg", None), overlay)
    if cfg.state_dict is None:
        cfg_file = checkpoints.locate(variant, cfg, kwargs.get("cache_dir"))
        where = str(cfg_file)
        overlay.update(file=where, source=None)
    else:
        where = "the given state_dict"
    return build_model_with_cfg(
        ResNet,
        variant,
        True,
        pretrained_cfg=cfg.to_dict(),
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=partial(
            checkpoints.check_for_model, where=where, num_classes=cfg.num_classes, in_chans=cfg.input_size[0]
        ),
        **kwargs,
    )


@register_model
def meta_uscl_resnet18(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 pretrained on ultrasound video with Meta-USCL: 512 features, 11.2 M parameters."""
    return _create("meta_uscl_resnet18", pretrained, **dict(dict(block=BasicBlock, layers=(2, 2, 2, 2)), **kwargs))


@register_model
def meta_uscl_resnet34(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-34 pretrained on ultrasound video with Meta-USCL: 512 features, 21.3 M parameters."""
    return _create("meta_uscl_resnet34", pretrained, **dict(dict(block=BasicBlock, layers=(3, 4, 6, 3)), **kwargs))


@register_model
def meta_uscl_resnet50(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-50 pretrained on ultrasound video with Meta-USCL: 2048 features, 23.5 M parameters."""
    return _create("meta_uscl_resnet50", pretrained, **dict(dict(block=Bottleneck, layers=(3, 4, 6, 3)), **kwargs))
