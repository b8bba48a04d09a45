"""load_meta_uscl_backbone: one call from a tag, a file, a folder or a Hub id to a model ready for use."""

from pathlib import Path

import timm
import torch

from uscl_hub import checkpoints, registry, sources, tensors
from uscl_hub.errors import CheckpointError


def load_meta_uscl_backbone(
    name: str = "meta_uscl_resnet18",
    *,
    checkpoint=None,
    pretrained: bool = True,
    in_chans: int = 3,
    num_classes: int = 0,
    features_only: bool = False,
    revision: str | None = None,
    cache_dir=None,
    **kwargs,
) -> torch.nn.Module:  # 8 arguments: those of timm.create_model and where the weights are
    """Build an ultrasound backbone and load its weights.

    name: 'meta_uscl_resnet18', '..._resnet34', '..._resnet50' or '..._efficientnet_lite0' (with or without '.tag');
    with a checkpoint also any timm model.
    checkpoint: None for the default release; or a released tag, a local .safetensors file, an exported
    folder, or a Hub id 'org/name' (looked for in this order; a Path is never a Hub id), the last with a revision
    (branch, tag or commit).
    pretrained: False for random weights.
    in_chans: 1 or 3 (grey in every channel) or any other; the first convolution is adapted as timm does.
    num_classes: 0 for features, N for a new classifier (kept if the checkpoint has one of N classes).
    features_only: return the list of feature maps at strides 2 to 32 instead.
    cache_dir: of the Hub; kwargs: passed to timm (global_pool, out_indices, drop_rate, ...).

    Returns an nn.Module in eval mode taking float32 (B, in_chans, H, W) and giving (B, features), features
    being 512, 2048 or 1280, or (B, num_classes) or the list of maps. `uscl_hub.create_transform(model)` makes its
    input.
    Raises CheckpointError, naming the file, if weights are missing, damaged or do not fit; ValueError for
    impossible or contradictory arguments.

    >>> model = load_meta_uscl_backbone("meta_uscl_resnet18")
    >>> model(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([2, 512])
    >>> maps = load_meta_uscl_backbone("meta_uscl_resnet18", features_only=True)
    >>> [tuple(m.shape[1:]) for m in maps(torch.zeros(1, 3, 64, 64))]
    [(64, 32, 32), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]
    """
    for argument, value, least in (("num_classes", num_classes, 0), ("in_chans", in_chans, 1)):
        if not hasattr(value, "__index__") or value < least:
            raise ValueError(f"{argument} is {value!r}, expected a whole number from {least}")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"unknown model {name!r}; ours are {', '.join(registry.ARCHITECTURES)}")
    if not pretrained and checkpoint is not None:
        raise ValueError("pretrained=False and a checkpoint contradict each other: leave one out")
    if features_only and num_classes:
        raise ValueError("features_only has no classifier: leave num_classes at 0")
    if checkpoint is None and architecture not in registry.ARCHITECTURES and pretrained:
        raise ValueError(f"{name!r} is not one of our models: pass a checkpoint (or use timm for its own weights)")
    if checkpoint is None and revision is not None:
        raise ValueError("revision only applies to a checkpoint on the Hub (org/name)")
    if checkpoint is not None:
        name, options = _resolve(name, sources.find(checkpoint, name, revision, cache_dir))
        kwargs = {**options, **kwargs}
    kwargs.update({"features_only": True} if features_only else {"num_classes": num_classes})
    return timm.create_model(name, pretrained=pretrained, in_chans=in_chans, cache_dir=cache_dir, **kwargs).eval()


def _resolve(name: str, source: sources.Source) -> tuple[str, dict]:
    """A model name and the source of its weights -> (timm name, arguments of create_model that the source decides)."""
    architecture = name.partition(".")[0]
    if source.release:
        if source.release.partition(".")[0] != architecture:
            right = source.release.partition(".")[0]
            raise CheckpointError(f"{source.release}: is not a checkpoint of {architecture}: pass name={right!r}")
        return source.release, {}
    if source.folder:
        return architecture, _of_folder(source.folder, name)
    if architecture not in registry.ARCHITECTURES:
        raise CheckpointError(
            f"{source.file}: a lone file is loaded into our models only; for {name} pass the exported folder"
        )
    return architecture, {"pretrained_cfg": _lone_cfg(source.file, architecture)}


def _of_folder(folder: Path, name: str) -> dict:
    cfg, found, model_args, config = checkpoints.read_config(folder)
    wanted = registry.plain_name(name)
    if registry.plain_name(found) != wanted:
        right = tensors.shorten(registry.our_name(registry.plain_name(found)))
        raise CheckpointError(f"{folder}: holds a {tensors.shorten(found)}, not a {wanted}: pass name={right!r}")
    if name.partition(".")[0] in registry.ARCHITECTURES and not model_args:
        checkpoints.check_provenance(folder, config)  # all else is checked on its way through timm
    else:
        checkpoints.check_folder(folder)
    return {"pretrained_cfg": cfg, **{k: v for k, v in model_args.items() if k not in ("in_chans", "num_classes")}}


def _lone_cfg(path, architecture: str) -> dict:
    ours, shapes = registry.ARCHITECTURES[architecture], tensors.read_shapes(path)
    cfg = registry.make_cfg(ours.px, ours.mean, ours.std, architecture=ours.timm)
    head, stem = shapes.get(f"{cfg['classifier']}.weight"), shapes.get(f"{cfg['first_conv']}.weight")
    # classes and channels are in the shapes, which are checked before anything is built; the rest is our default
    channels = stem[1] if stem and len(stem) == 4 and 0 < stem[1] <= 65_536 else 3
    return registry.make_cfg(
        ours.px,
        ours.mean,
        ours.std,
        channels=channels,
        architecture=ours.timm,
        num_classes=head[0] if head else 0,
        file=str(path),
    )
