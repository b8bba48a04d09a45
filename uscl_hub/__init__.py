"""Ultrasound image backbones pretrained with Meta-USCL. Importing this registers their timm models."""

from . import models as _models  # noqa: F401  (registers with timm)

__version__ = "0.1.0"
__all__ = ["UltrasoundDataset", "create_transform", "load_classifier", "load_meta_uscl_backbone"]


def __getattr__(name):  # PEP 562: what only some users need is imported when they use it
    if name == "create_transform":
        from uscl_hub.preprocess import create_transform

        return create_transform
    if name == "load_classifier":
        from uscl_hub.classifier import load_classifier

        return load_classifier
    if name == "load_meta_uscl_backbone":
        from uscl_hub.load import load_meta_uscl_backbone

        return load_meta_uscl_backbone
    if name == "UltrasoundDataset":
        from uscl_hub.dataset import UltrasoundDataset

        return UltrasoundDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
