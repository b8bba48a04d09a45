"""Every setting of a training, with the paper's values as defaults."""

import re
import sys
import typing
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path

import tyro
import yaml

from training.messages import user_errors_end
from uscl_hub.errors import UserError
from uscl_hub.files import write_text


@dataclass
class Data:
    """Where the clips come from, how they are cached and split."""

    roots: tuple[str, ...] = ()
    """Folders of clips, searched with any nesting: videos, DICOM, folders of numbered frames, images. None: the
    built-in demo with simulated clips."""
    cache: tuple[str, ...] = ()
    """Folder of the frame cache, or several, on several disks; none: beside the run ('cache' in the output folder).
    Of several, what is new goes into the first, with torchrun into each one's share of the processes."""
    cache_size: int = 0
    """Pixels of the cached frames' sides; 0: 1.25 x model.size, so that a crop of 0.7 ... 1 of the area is not
    enlarged."""
    crop: str = "crop"
    """Static user interface, text and borders around the moving sector: 'crop', 'blank' or 'none'."""
    sheets: bool = False
    """Write before/after sheets of the cropping of newly decoded clips as PNG, beside the cache."""
    frames: str = "auto"
    """Numbered images of one folder: 'clip', 'images' (separate ones), or 'auto' (a clip if neighbours look alike)."""
    max_frames: int = 400
    """Frames kept of a clip: its first ones."""
    simulated: int = 0
    """So many simulated clips of 8 frames are added to data.roots, as the source 'simulated'."""
    stride: int = 1
    """Keep every n-th frame of a clip."""
    balance: float = 0.0
    """0: every clip is drawn as often as any other; 1: every root folder as often as any other; between them,
    (clips of the folder) ** (1 - balance). A distillation draws frames: theirs is the number that counts."""
    min_clips: int = 8
    """Fewer readable clips than this end the run."""
    workers: int = 0
    """Processes that decode; 0: one a core."""
    group: str = ""
    """Regular expression, searched in a clip's id (root folder name/path). Its one capture group, or the one named
    'group', is the clip's patient. '': every clip is a patient of its own."""
    groups_csv: str = ""
    """CSV with the columns path and group, instead of a pattern."""
    label: str = ""
    """Regular expression, as data.group, for the label that the kNN probe looks for. '': the root folder."""
    meta_fraction: float = 0.1
    """Share of the groups that gives the clean pairs of the meta-loss."""
    val_fraction: float = 0.1
    """Share of the groups held out for validation."""
    licences: dict[str, str] = field(default_factory=dict)
    """Licence by root folder name, for the export's provenance; folders that are not named here are not named there."""


@dataclass
class Pairs:
    """Positive pair generation and augmentation (paper, section III-B)."""

    frames: int = 3
    """K, frames of a clip that span a pair's convex hull. 2: the two frames; 1: one frame twice."""
    mode: str = "standard"
    """'standard': two Beta-weighted mixes that share the middle frame; 'inner': random points of the hull."""
    max_dist: int = 999
    """Largest distance, in frames, between the frames of a pair."""
    alpha: float = 3.0
    """First parameter of the Beta distribution of the middle frame's weight."""
    beta: float = 5.0
    """Second parameter."""
    augment_first: bool = False
    """Augment every frame on its own, then mix; otherwise mix, then augment."""
    crop_scale: tuple[float, float] = (0.7, 1.0)
    """Area of the random resized crop."""
    crop_ratio: tuple[float, float] = (0.8, 1.25)
    """Its aspect ratio."""
    jitter: float = 0.64
    """Brightness and contrast factors lie in 1 +- jitter."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    rotate: float = 0.0
    """Each view is turned by up to so many degrees."""
    max_seconds: float = 0.0
    """Largest time between the frames of a pair, where a clip's frame rate is known; 0: no limit."""
    corrupt: float = 0.0
    """For tests and research only: so large a share of the training clips gives wrong pairs (another clip's, a black,
    frozen or noise frame). Which ones is in log.jsonl."""
    corrupt_often: float = 1.0
    """Probability that a pair of such a clip is wrong."""


@dataclass
class Loss:
    """The contrastive loss."""

    decoupled: bool = False
    """Leave the positive out of the denominator (DCL, Yeh et al., ECCV 2022)."""
    weights: str = "uniform"
    """Of the pairs of method 'uscl': 'uniform', or 'distance': they fall linearly with the distance between a pair's
    frames, from 1 to nearly 0 at the largest one allowed (as in IVPP, VanBerlo et al. 2024)."""


@dataclass
class Distil:
    """Frozen teachers whose features the backbone learns to give: alone (method 'distil'), or beside a contrast."""

    weight: float = 0.0
    """Of the distillation loss beside the contrastive one; 0: none. Method 'distil' has no other loss."""
    teachers: tuple[str, ...] = ("imagenet",)
    """imagenet, imagenet:lite1, imagenet:lite2, timm:NAME, a released tag, or an exported folder."""
    size: int = 224
    """Pixels of the crops that the teachers see; the student sees the same crops at model.size."""
    components: int = 512
    """Principal components of the teachers' features that are targets."""
    dense: float = 0.0
    """Weight of the teachers' feature maps as targets, where teachers and student end in maps."""
    batch: int = 0
    """Crops a step, over all ranks; 0: optim.batch."""
    lr: float = 1e-3
    """AdamW's learning rate of the student's head beside a contrastive loss."""
    scale: tuple[float, float] = (0.15, 1.0)
    """Area of the crops."""
    mixup: float = 0.5
    """Share of the crops that are mixed with another one."""
    pictures: float = 0.0
    """Share of the crops that are cut from natural pictures (extra [imagenet])."""
    round: int = 0
    """Crops that the teachers look at in one go, over all ranks, ahead of the student; 0: a batch."""
    passes: int = 1
    """How often the student sees a round's crops: more where teachers are slow."""


@dataclass
class Model:
    """What is trained."""

    name: str = "meta_uscl_resnet18"
    """Ours (meta_uscl_resnet18/34/50) or any timm model."""
    pretrained: bool = False
    """Start from the model's own weights, as timm loads them, instead of at random. With model.init timm:NAME they take
    our normalisation."""
    init: str = ""
    """Start from: imagenet (lite0; imagenet:lite1, :lite2), timm:NAME, a released tag, an exported folder, or NAME=FILE
    for a .safetensors file of the timm model NAME."""
    hold: int = 0
    """Stages that keep their weights and statistics, from the input on: 1 is the stem."""
    size: int = 64
    """Pixels of the input's sides."""
    dim: int = 128
    """Width of the projection."""


@dataclass
class Meta:
    """CMW-Net and its learning (paper, section III-C)."""

    lr: float = 6e-5
    """Adam's learning rate."""
    batch: int = 0
    """Clean pairs a step, over all ranks; 0: as many as optim.batch."""
    hidden: int = 10
    """Hidden units."""
    every: int = 1
    """Update CMW-Net every so many steps."""
    delayed: bool = False
    """Step with the weights from before CMW-Net's update: one backward pass less a step."""
    shuffle: bool = False
    """A control: every pair has the weight of another pair of the batch. With meta.every 1, and not delayed."""
    tangent: str = "exact"
    """'exact' (forward mode) or 'difference' (central difference of two forward passes)."""
    depth: int = 0
    """Look ahead with the last so many stages of the backbone and the projector only: cheaper; 0: with all."""
    input: str = "representation"
    """What CMW-Net sees of a pair: 'representation' (both, as in the paper), or 'statistics': similarity, distance of
    the frames and loss, each standardised in the batch, as constants."""
    by_source: bool = False
    """Weights are relative to the mean weight of the same root folder's pairs in the batch."""
    warmup: float = 0.0
    """So large a share of the steps, the first ones, is plain: no weights, no update of CMW-Net."""


@dataclass
class Optim:
    """SGD with a cosine schedule; AdamW for method 'distil'."""

    batch: int = 32
    """Clips a step, over all ranks."""
    epochs: int = 300
    """Passes over the training clips."""
    steps: int = 0
    """Steps in all, instead of epochs; 0: as many as the epochs give."""
    lr: float = 0.1
    """Peak learning rate."""
    warmup_epochs: float = 10
    """Linear warm-up, at most a tenth of the training."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 1e-4
    """On all parameters, as in the paper; AdamW spares norms and biases."""
    decay_norm_and_bias: bool = True
    """Of SGD: False spares norms and biases the weight decay."""
    temperature: float = 0.5
    """Of InfoNCE."""


@dataclass
class Config:
    """Train Meta-USCL. Without data.roots, the built-in demo on simulated clips runs."""

    out: str = "runs/demo"
    """Output folder: config.yaml, checkpoint.pt, log.jsonl, tensorboard/, figures/, export/."""
    method: str = "meta_uscl"
    """'simclr' (one frame twice, no weights), 'uscl' (PPI, no weights), 'meta_uscl', or 'distil' (no pairs: the
    features of distil.teachers)."""
    seed: int = 0
    """Fixes weights, splits, order, pairs and augmentations."""
    resume: bool = False
    """Go on from the output folder's checkpoint."""
    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""
    precision: str = "fp32"
    """'fp32' or 'bf16' (autocast of the encoder; inexact meta-gradients in the first steps, see
    docs/results/speed.md)."""
    save_every: int = 200
    """Steps between checkpoints."""
    eval_epochs: int = 1
    """Epochs between validations; the last step always has one."""
    data: Data = field(default_factory=Data)
    pairs: Pairs = field(default_factory=Pairs)
    model: Model = field(default_factory=Model)
    meta: Meta = field(default_factory=Meta)
    loss: Loss = field(default_factory=Loss)
    distil: Distil = field(default_factory=Distil)
    optim: Optim = field(default_factory=Optim)


def cache_folders(config, out):
    """The folders of a training's frame cache. out: its output folder."""
    named = config.data.cache
    named = (named,) if isinstance(named, str) else named  # one, as in scripts for version 0.1
    return [Path(folder) for folder in named if folder] or [Path(out) / "cache"]


def training_pairs(config):
    """The settings of the pairs to learn from: SimCLR's are one frame twice."""
    return replace(config.pairs, frames=1) if config.method == "simclr" else config.pairs


def cli(kind, description=None, args=None, fallback=None):
    """Parse the command line: `--config FILE.yaml`, then dotted overrides (`--optim.lr 0.05`).

    Args:
        kind: a dataclass with defaults for every field.
        fallback: YAML file that serves when the command line names none.

    Returns:
        An instance of `kind`. Unknown names or values of the wrong type end the program with a message (status 2).
    """
    args = list(sys.argv[1:] if args is None else args)
    path = fallback
    for i, arg in enumerate(args):
        if arg == "--config" or arg.startswith("--config="):
            if arg == "--config" and i + 1 == len(args):
                raise SystemExit("--config: name a YAML file")
            path = arg.partition("=")[2] or args[i + 1]
            del args[i : i + (1 if "=" in arg else 2)]
            break
    with user_errors_end():
        default = kind() if path is None else load(kind, path)
    args = with_flags(args, switches(kind))
    return tyro.cli(kind, args=args, default=default, description=description)


def switches(kind, prefix=""):
    """The dotted names of the settings that are True or False."""
    for name, type_ in typing.get_type_hints(kind).items():
        if is_dataclass(type_):
            yield from switches(type_, f"{prefix}{name}.")
        elif type_ is bool:
            yield f"{prefix}{name}"


def with_flags(args, names):
    """The arguments, with `--resume True` and `--resume=False`, as up to version 0.1, as `--resume`, `--no-resume`."""
    off = {f"--{name}".replace("_", "-"): re.sub(r"(\w+)$", r"no-\1", f"--{name}").replace("_", "-") for name in names}
    result = []
    for arg in args:
        name, equals, value = arg.partition("=")
        if arg in ("True", "False") and result and result[-1] in off:
            result[-1] = result[-1] if arg == "True" else off[result[-1]]
        elif (on := name.replace("_", "-")) in off and (value in ("True", "False") or not equals):
            result.append(off[on] if value == "False" else on)
        else:
            result.append(arg)
    return result


def load(kind, path):
    """Read a YAML file into the dataclass `kind`; fields it leaves out keep their defaults.

    Raises:
        UserError: the file is missing, is not YAML, names an unknown field or has a value of another type.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: {' '.join(str(error).split())}")
    return _fill(kind(), values, path)


def _fill(instance, values, path, prefix=""):
    if not isinstance(values, dict):
        raise UserError(f"{path}: {prefix.rstrip('.') or 'the file'} must be a mapping, got {values!r}")
    types = typing.get_type_hints(type(instance))
    for name, value in values.items():
        if name not in types:
            raise UserError(f"{path}: unknown setting {prefix}{name}; known here: {', '.join(types)}")
        if is_dataclass(types[name]):
            value = _fill(getattr(instance, name), value, path, f"{prefix}{name}.")
        else:
            try:
                value = _convert(value, types[name])
            except (TypeError, ValueError):
                wanted = types[name].__name__ if isinstance(types[name], type) else types[name]
                raise UserError(f"{path}: {prefix}{name} must be {wanted}, got {value!r}")
        setattr(instance, name, value)
    return instance


def _convert(value, kind):
    """A value read from YAML as the type of a field; TypeError or ValueError if it is another."""
    parts = typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        items = value if isinstance(value, list) else [value]
        if parts[-1] is Ellipsis:
            return tuple(_convert(item, parts[0]) for item in items)
        return tuple(_convert(item, part) for item, part in zip(items, parts, strict=True))
    if typing.get_origin(kind) is dict:
        return {_convert(k, parts[0]): _convert(v, parts[1]) for k, v in dict(value).items()}
    if kind is float and type(value) in (int, str):  # YAML reads 6e-5 as a string
        return float(value)
    if type(value) is not kind:
        raise TypeError
    return value


def dump(config, path):
    """Write a config as YAML that `load` reads back to an equal one."""

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return list(value) if isinstance(value, tuple) else value

    write_text(path, yaml.safe_dump(plain(asdict(config)), sort_keys=False))
