"""load_meta_uscl_backbone: one call from a tag, a file, a folder or a Hub id to a model ready for use."""

from pathlib import Path

import timm
import torch

from uscl_hub import checkpoints, hub, models
from uscl_hub.checkpoints import CheckpointError


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
) -> torch.nn.Module:
    """Build an ultrasound backbone and load its weights.

    name: 'meta_uscl_resnet18', '...34' or '...50' (with or without '.tag'); with a checkpoint also any timm
    model.
    checkpoint: None for the default release; or a released tag, a local .safetensors file, an exported
    folder, or a Hub id 'org/name' (looked for in this order), the last with a revision (branch, tag or
    commit).
    pretrained: False for random weights.
    in_chans: 1 or 3 (grey in every channel) or any other; the first convolution is adapted as timm does.
    num_classes: 0 for features, N for a new classifier (kept if the checkpoint has one of N classes).
    features_only: return the list of feature maps at strides 2 to 32 instead.
    cache_dir: of the Hub; kwargs: passed to timm (global_pool, out_indices, drop_rate, ...).

    Returns an nn.Module in eval mode taking float32 (B, in_chans, H, W) and giving (B, features), features
    being 512 or 2048, or (B, num_classes) or the list of maps. `uscl_hub.create_transform(model)` makes its
    input.
    Raises CheckpointError, naming the file, if weights are missing, damaged or do not fit; ValueError for
    contradictory arguments.
    """
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        raise ValueError(f"unknown model {name!r}; ours are {', '.join(models.ARCHITECTURES)}")
    if not pretrained and checkpoint is not None:
        raise ValueError("pretrained=False and a checkpoint contradict each other: leave one out")
    if features_only and num_classes:
        raise ValueError("features_only has no classifier: leave num_classes at 0")
    if checkpoint is None and architecture not in models.ARCHITECTURES and pretrained:
        raise ValueError(f"{name!r} is not one of our models: pass a checkpoint (or use timm for its own weights)")
    pretrained_cfg, folder = None, None
    if checkpoint is not None:
        name, pretrained_cfg, folder = _resolve(name, checkpoint, revision, cache_dir)
    elif revision is not None:
        raise ValueError("revision only applies to a checkpoint on the Hub (org/name)")
    if features_only:
        kwargs["features_only"] = True
    else:
        kwargs["num_classes"] = num_classes
    if pretrained_cfg is not None:
        kwargs["pretrained_cfg"] = pretrained_cfg
        if architecture not in models.ARCHITECTURES:  # ours are checked on their way through timm
            checkpoints.check_folder(folder)
    return timm.create_model(name, pretrained=pretrained, in_chans=in_chans, cache_dir=cache_dir, **kwargs).eval()


def _resolve(name: str, checkpoint, revision, cache_dir) -> tuple[str, dict | None, Path | None]:
    """-> (timm name, pretrained_cfg or None for the registered one, exported folder or None)."""
    architecture, text, path = name.split(".")[0], str(checkpoint), Path(checkpoint).expanduser()
    for tag in (text, f"{architecture}.{text}"):
        if tag in models.releases():
            if revision is not None:
                raise ValueError(f"{tag} is a released checkpoint; revision only applies to the Hub (org/name)")
            if tag.split(".")[0] != architecture:
                raise CheckpointError(f"{tag}: is not a checkpoint of {architecture}: pass name={tag.split('.')[0]!r}")
            return tag, None, None
    if path.exists():
        if revision is not None:
            raise ValueError(f"{path} is local; revision only applies to a checkpoint on the Hub (org/name)")
        if path.is_file() and not (
            path.name == checkpoints.WEIGHTS_NAME and (path.parent / checkpoints.CONFIG_NAME).is_file()
        ):
            if architecture not in models.ARCHITECTURES:
                raise CheckpointError(
                    f"{path}: a lone file is loaded into our models only; for {name} pass the exported folder"
                )
            return architecture, _lone_cfg(path), None
        folder = path.parent if path.is_file() else path
    elif hub.is_repo_id(text) and not text.endswith((".safetensors", ".pth", ".pt")):
        folder = hub.fetch_folder(text, revision, cache_dir)
    else:
        released = ", ".join(models.releases()) or "none yet"
        raise CheckpointError(
            f"{text}: neither a released tag ({released}), nor an existing .safetensors file or "
            "exported folder, nor a Hub id of the form org/name"
        )
    cfg, found, _, config = checkpoints.read_config(folder)
    ours = models.ARCHITECTURES.get(architecture, architecture)
    if models.ARCHITECTURES.get(found, found) != ours:
        suggestion = {v: k for k, v in models.ARCHITECTURES.items()}.get(found, found)
        raise CheckpointError(f"{folder}: holds a {found}, not a {ours}: pass name={suggestion!r}")
    checkpoints.check_provenance(folder, config)
    return architecture, cfg, folder


def _lone_cfg(path: Path) -> dict:
    header = checkpoints.read_header(path)  # classes and channels are in the shapes; the rest is our default
    classes, channels = (header.get(key, {}).get("shape") for key in ("fc.weight", "conv1.weight"))
    cfg = models.make_cfg(num_classes=classes[0] if classes else 0, file=str(path))
    if channels and len(channels) == 4 and channels[1] > 0:
        cfg["input_size"] = (channels[1], *cfg["input_size"][1:])
        cfg["mean"], cfg["std"] = (models.MEAN,) * channels[1], (models.STD,) * channels[1]
    return cfg
