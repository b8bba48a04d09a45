"""The timm models meta_uscl_resnet18, meta_uscl_resnet34, meta_uscl_resnet50 and meta_uscl_efficientnet_lite0.

They are timm's own networks (same modules, same state-dict names) with ultrasound pretrained_cfgs, see registry.py.
Without num_classes they are feature extractors, as their checkpoints are: there is no classifier to load.
"""

from functools import partial
from pathlib import Path

import torch
from timm.models import generate_default_cfgs, get_pretrained_cfg, model_entrypoint, register_model
from timm.models._builder import resolve_pretrained_cfg
from torch import nn

from uscl_hub import registry, sources, tensors
from uscl_hub.registry import WEIGHTS, make_cfg, provenance, releases  # noqa: F401  (names of version 0.1)

ARCHITECTURES = {name: ours.timm for name, ours in registry.ARCHITECTURES.items()}
NOT_OF_THE_LAYERS = {  # arguments that change none of a checkpoint's weights
    *("features_only", "out_indices", "feature_cls", "global_pool", "in_chans", "num_classes"),
    *("device", "dtype", "cache_dir"),
}

default_cfgs = generate_default_cfgs(registry.pretrained_cfgs())


def _create(name: str, pretrained: bool, **kwargs) -> nn.Module:
    build = model_entrypoint(registry.ARCHITECTURES[name].timm)
    if kwargs.get("features_only"):
        kwargs.pop("num_classes", None)  # there is no classifier; timm's own loading fails on a number of classes
    overlay = dict(kwargs.pop("pretrained_cfg_overlay", None) or {})
    own = {"file": None, "hf_hub_id": None, "url": ""}
    if own.keys() & overlay.keys():  # what the caller names comes before the release's own sources
        overlay = {**own, **overlay}
    cfg = resolve_pretrained_cfg(name, kwargs.pop("pretrained_cfg", None), overlay)
    if not pretrained:
        return build(pretrained=False, pretrained_cfg=cfg, **kwargs)
    # Find and check the file before timm reads it, then let timm load it in its own way. Whatever the source, the
    # weights are a safetensors file: timm alone would fall back to unpickling.
    where: str | Path = "the given state_dict"
    if cfg.state_dict is None:
        where = sources.locate(name, cfg, kwargs.get("cache_dir"))
        overlay = {"file": str(where), "source": None}
        cfg = resolve_pretrained_cfg(name, cfg, overlay)  # type: ignore[arg-type]  # timm takes its own class too
        shapes = tensors.read_shapes(where)
    else:
        shapes = {k: tuple(v.shape) for k, v in cfg.state_dict.items()}
    with torch.device("meta"):
        options = {k: v for k, v in kwargs.items() if k not in NOT_OF_THE_LAYERS}
        whole = build(pretrained_cfg=cfg, in_chans=cfg.input_size[0], num_classes=cfg.num_classes, **options)
    tensors.check_shapes(shapes, whole, where)
    check = partial(tensors.check_values, where=where)
    return build(pretrained=True, pretrained_cfg=cfg, pretrained_filter_fn=check, **kwargs)


@register_model
def meta_uscl_resnet18(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-18 for ultrasound: 512 features, 11.2 M parameters. Released weights: `registry.releases()`.

    >>> meta_uscl_resnet18()(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 512])
    """
    return _create("meta_uscl_resnet18", pretrained, **kwargs)


@register_model
def meta_uscl_resnet34(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-34 for ultrasound, to be trained; it has no released weights: 512 features, 21.3 M parameters.

    >>> meta_uscl_resnet34()(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 512])
    """
    return _create("meta_uscl_resnet34", pretrained, **kwargs)


@register_model
def meta_uscl_resnet50(pretrained: bool = False, **kwargs) -> nn.Module:
    """ResNet-50 for ultrasound, to be trained; it has no released weights: 2048 features, 23.5 M parameters.

    >>> meta_uscl_resnet50()(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 2048])
    """
    return _create("meta_uscl_resnet50", pretrained, **kwargs)


@register_model
def meta_uscl_efficientnet_lite0(pretrained: bool = False, **kwargs) -> nn.Module:
    """EfficientNet-Lite0 for ultrasound: 1280 features, 3.4 M parameters. One released checkpoint.

    >>> meta_uscl_efficientnet_lite0()(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 1280])
    """
    return _create("meta_uscl_efficientnet_lite0", pretrained, **kwargs)


def width(model: nn.Module) -> int:
    """Features that a timm model without classifier gives for an image.

    Some heads (MobileNetV3) widen the pooled features: `num_features` is then not what comes out.

    >>> width(meta_uscl_resnet18())
    512
    """
    return int(getattr(model, "head_hidden_size", None) or model.num_features)  # type: ignore[arg-type]


def size_arguments(name: str, px: int) -> dict:
    """What timm.create_model must be told of inputs of px pixels: vision transformers are built for one size.

    >>> size_arguments("vit_tiny_patch16_224", 112), size_arguments("meta_uscl_resnet18", 112)
    ({'img_size': 112}, {})
    """
    cfg = get_pretrained_cfg(registry.plain_name(name), allow_unregistered=True)
    return {"img_size": px} if px and cfg is not None and cfg.fixed_input_size else {}
