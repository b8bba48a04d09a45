"""The one definition of preprocessing, shared by training, evaluation and deployment.

An ultrasound frame becomes grey (ITU-R 601 luma), is squashed to a square with an antialiased bilinear
filter, and is normalised with one mean and one standard deviation. The backbone's input channels all
carry that same grey image.
"""

import math
import numbers
import warnings
from functools import partial

import numpy as np
import torch
from PIL import Image

MEAN, STD = 0.18, 0.24  # of ultrasound frames in [0, 1], as in the authors' Meta-USCL code


def to_grey(image) -> np.ndarray:
    """Any one image -> uint8 (H, W).

    image: PIL image of any mode; ndarray (H, W) or (H, W, 1|3|4); tensor (H, W) or (1|3|4, H, W). Arrays and
    tensors are bool, uint8, uint16, or floating point in [0, 1]. Colour becomes ITU-R 601 luma exactly as
    PIL's convert('L') (alpha is ignored), 16 bit becomes 8 bit by rounding x / 257: an image whose values need
    only 12 of its 16 bits comes out nearly black, with a warning. `uscl_hub.clips` shows such files as viewers do.
    Raises TypeError for anything that is not an image and ValueError for a wrong shape, dtype or range, or
    NaN.

    >>> to_grey(np.array([[[255, 0, 0], [0, 255, 0]]], np.uint8))
    array([[ 76, 150]], dtype=uint8)
    """
    if isinstance(image, Image.Image):
        if image.mode == "L":
            return _not_empty(np.array(image))
        if not (image.mode == "F" or image.mode.startswith("I")):
            try:
                return _not_empty(np.array(image.convert("L")))
            except ValueError:
                raise ValueError(f"image of mode {image.mode} has no grey: convert it to L or RGB first") from None
        array = np.array(image)
        if image.mode == "I":  # PIL's 32 bit integers are how it opens some 16 bit files
            if array.size and (array.min() < 0 or array.max() > 65535):
                raise ValueError(
                    f"image of mode I has values from {array.min()} to {array.max()}; "
                    "only 16 bit (0 to 65535) is understood: rescale it first"
                )
            array = array.astype(np.uint16)
    elif isinstance(image, torch.Tensor):
        tensor = image.detach().cpu()
        array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        if array.ndim == 3:
            if array.shape[0] not in (1, 3, 4):
                raise ValueError(
                    f"tensor image has shape {tuple(array.shape)}; expected (H, W) or (C, H, W) with 1, 3 or 4 channels"
                )
            array = array.transpose(1, 2, 0)
    elif isinstance(image, np.ndarray):
        array = image
    else:
        raise TypeError(f"expected a PIL image, a numpy array or a tensor, got {type(image).__name__}")

    if not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (1, 3, 4)):
        raise ValueError(f"image has shape {tuple(array.shape)}; expected (H, W) or (H, W, C) with 1, 3 or 4 channels")
    array = _to_uint8(_not_empty(array))
    if array.ndim == 3:
        array = array[..., 0] if array.shape[2] == 1 else np.array(Image.fromarray(array[..., :3].copy()).convert("L"))
    return np.ascontiguousarray(array)


def _not_empty(array: np.ndarray) -> np.ndarray:
    if array.size == 0:
        raise ValueError(f"image of shape {tuple(array.shape)} has no pixels")
    return array


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # either byte order
        if 0 < (highest := int(array.max())) < 4096:
            warnings.warn(
                f"a 16 bit image has no value above {highest}: of 65535, that is nearly black. Divide it by its full "
                "scale (4095 for 12 bits) first",
                stacklevel=2,
            )
        return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise ValueError("floating point image has NaN or infinite values")
        if low < -1e-5 or high > 1 + 1e-5:  # the margin is float rounding, not a different range
            raise ValueError(
                f"floating point image has values from {low:g} to {high:g}; expected [0, 1]: "
                "divide it by its full scale, or pass uint8"
            )
        return np.rint(array.astype(np.float64).clip(0, 1) * 255).astype(np.uint8)
    raise ValueError(f"image has dtype {array.dtype}; expected bool, uint8, uint16 or floating point in [0, 1]")


def resize(grey: np.ndarray, size: int) -> np.ndarray:
    """uint8 (H, W) -> uint8 (size, size): PIL's antialiased bilinear filter, aspect ratio not kept.

    The same pixels as torchvision's Resize((size, size)) of a PIL 'L' image.

    >>> resize(np.array([[0, 100], [100, 200]], np.uint8), 1)
    array([[100]], dtype=uint8)
    """
    if grey.dtype != np.uint8 or grey.ndim != 2:
        raise ValueError(
            f"resize expects a uint8 (H, W) array, got {grey.dtype} {tuple(grey.shape)}: use to_grey first"
        )
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return np.array(Image.fromarray(grey).resize((size, size), Image.Resampling.BILINEAR))


def normalise(grey: np.ndarray, in_chans: int = 3, mean=MEAN, std=STD, dtype: torch.dtype | None = None):
    """uint8 (..., H, W) -> float tensor (..., in_chans, H, W): (x / 255 - mean) / std, calculated in float32.

    mean, std: a number, or one number a channel. dtype: of the tensor, by default torch's default dtype, as that of
    new networks. Raises ValueError if mean or std do not fit in_chans.

    >>> normalise(np.full((4, 4), 255, np.uint8)).shape
    torch.Size([3, 4, 4])
    """
    dtype = dtype or torch.get_default_dtype()
    if grey.dtype != np.uint8:
        raise ValueError(f"normalise expects uint8, got {grey.dtype}")
    x = torch.from_numpy(grey.astype(np.float32)).div_(255).unsqueeze(-3)
    if np.ndim(mean) == 0 and np.ndim(std) == 0:  # all channels are equal: do the arithmetic once
        x = x.sub_(mean).div_(std)
        return x.expand(*x.shape[:-3], in_chans, *x.shape[-2:]).contiguous().to(dtype)
    mean, std = (torch.tensor(v, dtype=torch.float32).expand(in_chans).view(-1, 1, 1) for v in (mean, std))
    return x.sub(mean).div_(std).to(dtype)


def create_transform(model_or_cfg, size: int | None = None, in_chans: int | None = None):
    """The preprocessing that a model expects, as a picklable callable.

    model_or_cfg: a timm model, also compiled, parallel, quantised, with hooks or inside of another module; or its
    pretrained_cfg, which an exported or scripted module has not kept. size: pixels of the square input, default the
    cfg's input_size. in_chans: default the channels of the model's first convolution, else the cfg's.
    The callable takes one image (see `to_grey`) and returns (in_chans, size, size), in float32 unless the model's
    weights are float64.
    Raises ValueError if the cfg lacks what is needed.

    >>> transform = create_transform({"input_size": (3, 64, 64), "mean": (0.18,) * 3, "std": (0.24,) * 3})
    >>> transform(np.zeros((300, 400), np.uint8)).shape
    torch.Size([3, 64, 64])
    """
    model = model_or_cfg if isinstance(model_or_cfg, torch.nn.Module) else None
    cfg = getattr(model_or_cfg, "pretrained_cfg", model_or_cfg) if model is None else _find_cfg(model)
    if hasattr(cfg, "to_dict"):
        cfg = cfg.to_dict()
    if not isinstance(cfg, dict):
        raise ValueError(
            f"{type(model_or_cfg).__name__} has no pretrained_cfg: pass a timm model or its pretrained_cfg (of an "
            "exported, traced or rewritten network that of the model it was made of, with in_chans=)"
        )
    input_size = cfg.get("input_size")
    if size is None:
        size = _side(input_size)
    if in_chans is None:
        in_chans = _channels(model, cfg) or (input_size[0] if input_size else 3)
    for argument, value in (("size", size), ("in_chans", in_chans)):
        if not hasattr(value, "__index__") or value < 1:
            raise ValueError(f"{argument} is {value!r}, expected a whole number from 1")
    mean, std = _per_channel(cfg, "mean", MEAN, in_chans), _per_channel(cfg, "std", STD, in_chans)
    if not np.all(np.asarray(std) > 0):
        raise ValueError(f"the pretrained_cfg's std is {cfg['std']!r}, expected numbers above 0")
    double = any(p.dtype == torch.float64 for p in model.parameters()) if model is not None else False
    dtype = torch.float64 if double else torch.float32
    return partial(_preprocess, size=size, in_chans=in_chans, mean=mean, std=std, dtype=dtype)


def _preprocess(image, *, size, in_chans, mean, std, dtype=torch.float32) -> torch.Tensor:
    return normalise(resize(to_grey(image), size), in_chans, mean, std, dtype)


def _find_cfg(model: torch.nn.Module):
    """The pretrained_cfg of a model, or of the first module in it that has one: wrappers come and go."""
    found = (getattr(module, "pretrained_cfg", None) for module in model.modules())
    return next((cfg for cfg in found if isinstance(cfg, dict) or hasattr(cfg, "to_dict")), None)


def _channels(model: torch.nn.Module | None, cfg: dict) -> int | None:
    """Input channels of the convolution that the cfg names, whatever wrappers put before the name, or of the first."""
    modules = {} if model is None else dict(model.named_modules())
    convolutions = {name: m for name, m in modules.items() if isinstance(getattr(m, "in_channels", None), int)}
    first = cfg.get("first_conv")
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    if isinstance(first, str):
        spellings = (first, first.replace(".", "_"))  # wrappers for feature maps join names by _
        for name, module in convolutions.items():
            if any(name == spelling or name.endswith(f".{spelling}") for spelling in spellings):
                return module.in_channels
    return next((module.in_channels for module in convolutions.values()), None)


def _side(input_size) -> int:
    if input_size is None:
        raise ValueError("the pretrained_cfg has no input_size: pass size=")
    if not isinstance(input_size, (tuple, list)) or len(input_size) != 3 or input_size[1] != input_size[2]:
        raise ValueError(
            f"the pretrained_cfg's input_size is {input_size!r}, expected (channels, px, px): pass size= for a square"
        )
    return input_size[-1]


def _per_channel(cfg: dict, key: str, default: float, in_chans: int):
    value = default if cfg.get(key) is None else cfg[key]
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in values):
        raise ValueError(f"the pretrained_cfg's {key} is {value!r}, expected a number, or one a channel")
    values = tuple(map(float, values))
    if len(set(values)) == 1:
        return values[0]
    if len(values) != in_chans:
        raise ValueError(
            f"the pretrained_cfg's {key} has {len(values)} different values but the model takes "
            f"{in_chans} channel(s): give the pretrained_cfg one {key}"
        )
    return values
