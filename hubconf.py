"""Entry points for torch.hub. Everything else here is private: torch.hub lists every public callable."""

dependencies = ["torch", "torchvision", "timm", "huggingface_hub", "safetensors", "PIL", "numpy"]


def _package():
    """This checkout's uscl_hub, or the one already imported, with a warning if that is another version."""
    import os
    import re
    import sys
    import warnings

    here = os.path.dirname(os.path.abspath(__file__))
    sys.path.insert(0, here)  # absolute, so that later lazy imports work from any directory
    try:
        import uscl_hub
    finally:
        sys.path.remove(here)
    with open(os.path.join(here, "uscl_hub", "__init__.py"), encoding="utf-8") as f:
        version = re.search(r"""^__version__ = ["'](.+)["']""", f.read(), re.MULTILINE)[1]
    if uscl_hub.__version__ != version:
        warnings.warn(
            f"uscl_hub {uscl_hub.__version__} was already imported from {os.path.dirname(uscl_hub.__file__)} and is "
            f"used instead of version {version} in {here}. To use the latter, load from it before importing uscl_hub, "
            "or install it",
            stacklevel=3,
        )
    return uscl_hub


def meta_uscl_resnet18(pretrained=True, **kwargs):
    """ResNet-18 for ultrasound: (B, 3, px, px) -> (B, 512) features.

    pretrained (bool): load the default released weights.
    kwargs: checkpoint (released tag, .safetensors file, exported folder or Hub id org/name), revision,
    in_chans, num_classes, features_only, cache_dir, as for uscl_hub.load_meta_uscl_backbone.
    Returns an nn.Module in eval mode.
    """
    return _package().load_meta_uscl_backbone("meta_uscl_resnet18", pretrained=pretrained, **kwargs)


def meta_uscl_resnet34(pretrained=True, **kwargs):
    """ResNet-34 for ultrasound: (B, 3, px, px) -> (B, 512) features.

    Arguments as for meta_uscl_resnet18.
    """
    return _package().load_meta_uscl_backbone("meta_uscl_resnet34", pretrained=pretrained, **kwargs)


def meta_uscl_resnet50(pretrained=True, **kwargs):
    """ResNet-50 for ultrasound: (B, 3, px, px) -> (B, 2048) features.

    Arguments as for meta_uscl_resnet18.
    """
    return _package().load_meta_uscl_backbone("meta_uscl_resnet50", pretrained=pretrained, **kwargs)


def meta_uscl_efficientnet_lite0(pretrained=True, **kwargs):
    """EfficientNet-Lite0 for ultrasound: (B, 3, px, px) -> (B, 1280) features.

    Arguments as for meta_uscl_resnet18.
    """
    return _package().load_meta_uscl_backbone("meta_uscl_efficientnet_lite0", pretrained=pretrained, **kwargs)


def meta_uscl_backbone(name="meta_uscl_resnet18", **kwargs):
    """A Meta-USCL backbone and its preprocessing: returns (model, transform).

    name (str): meta_uscl_resnet18, meta_uscl_resnet34, meta_uscl_resnet50 or meta_uscl_efficientnet_lite0.
    kwargs: as for uscl_hub.load_meta_uscl_backbone (checkpoint, pretrained, in_chans, num_classes, ...).
    The transform: PIL image, numpy array or tensor, grey or colour -> float32 (C, px, px) with the weights' px.
    """
    package = _package()
    model = package.load_meta_uscl_backbone(name, **kwargs)
    return model, package.create_transform(model)
