"""The authors' released checkpoints (.pth) into our format.

Their encoder is nn.Sequential(*list(torchvision_resnet.children())[:-1]) under the name `features`, so that
features.0 is conv1, features.1 is bn1 and features.4 to features.7 are layer1 to layer4. `l1` and `l2` are
the projection head; the older USCL files have `linear` and `fc` heads as well. Heads are dropped.
"""

import io
import pickle
import re
import zipfile
from pathlib import Path

import timm
import torch

from uscl_hub import __version__, checkpoints, registry, tensors
from uscl_hub.errors import CheckpointError
from uscl_hub.files import NotAFile, check_regular, sha256

STAGES = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
HEAD = re.compile(r"(l1|l2|linear|fc)\.(weight|bias)")
NORMALISATION = {"meta_uscl": (0.18, 0.24), "uscl": (0.5, 0.25)}  # mean, std of the two methods' code


def read_pth(path) -> dict[str, torch.Tensor]:
    """The state dict in a .pth file, read with weights_only=True. Raises CheckpointError.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "official.pth"
    >>> torch.save({"state_dict": {"features.0.weight": torch.zeros(64, 3, 7, 7)}, "epoch": 300}, path)
    >>> {name: tuple(value.shape) for name, value in read_pth(path).items()}
    {'features.0.weight': (64, 3, 7, 7)}
    """
    try:
        check_regular(path)
        content = torch.load(_verified(path), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except NotAFile as error:
        raise CheckpointError(str(error)) from None
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Check the path") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: holds more than tensors (numpy scalars, for example), which is refused because unpickling it "
            "would run its code. If you trust whoever made it, open it once with torch.load(..., weights_only=False), "
            "save only its tensors with torch.save({'state_dict': {name: tensor, ...}}, NEW), and convert NEW "
            f"({_cause(error)})"
        ) from error
    except Exception as error:  # a damaged pickle can make the unpickler raise anything
        raise CheckpointError(f"{path}: cannot be read as a .pth file ({_cause(error)}). Download it again") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items())
    ):
        raise CheckpointError(
            f"{path}: has neither a 'state_dict' of tensors nor is one. It is not one of the authors' checkpoints"
        )
    if odd := [key for key, value in state.items() if not tensors.is_plain(value)]:
        raise CheckpointError(
            f"{path}: {tensors.some(odd)} sparse, quantised, complex or without values. Save plain tensors"
        )
    return state


def _verified(path):
    """What torch.load may be given: it looks at no checksum, so of a zip archive a copy made of what passed them."""
    if not zipfile.is_zipfile(path):  # PyTorch's format before 1.6
        _refuse_allocation(Path(path).read_bytes(), path)
        return path
    copy = io.BytesIO()
    try:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as verified:
            if sum(entry.file_size for entry in archive.infolist()) > Path(path).stat().st_size:
                raise zipfile.BadZipFile("it claims to hold more than its size")
            for entry in archive.infolist():
                content = archive.read(entry)
                if entry.filename.endswith(".pkl"):
                    _refuse_allocation(content, path)
                verified.writestr(entry.filename, content)
    except CheckpointError:
        raise
    except Exception as error:  # zipfile raises many kinds on damaged archives
        raise CheckpointError(f"{path}: is damaged ({_cause(error)}). Download it again") from error
    copy.seek(0)
    return copy


def _refuse_allocation(pickled: bytes, path) -> None:
    """Of what weights_only=True lets a pickle call, bytearray(N) takes any amount of memory; no tensor needs it."""
    if b"bytearray" in pickled:
        raise CheckpointError(f"{path}: asks for a bytearray, which tensors do not need. Save its tensors only")


def _cause(error) -> str:
    """What torch or zipfile says, in one line; of torch's advice how to load the file all the same only the cause."""
    lines = [line.split("WeightsUnpickler error: ")[-1].strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Weights only load failed", "(1)", "(2)"))]
    return tensors.shorten((told or [type(error).__name__])[0])


def rename(state: dict[str, torch.Tensor], where) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Legacy names -> (timm's names, dropped head names). Raises CheckpointError on an unknown name.

    >>> state = {"module.features.0.weight": torch.zeros(64, 3, 7, 7), "module.l1.weight": torch.zeros(512, 512)}
    >>> renamed, dropped = rename(state, "official.pth")
    >>> list(renamed), dropped
    (['conv1.weight'], ['l1.weight'])
    """
    if all(k.startswith("module.") for k in state):  # saved from DataParallel
        state = {k.removeprefix("module."): v for k, v in state.items()}
    renamed, dropped, unknown = {}, [], []
    for key, value in state.items():
        match = re.fullmatch(r"features\.(\d+)\.(.+)", key)
        if match and match[1] in STAGES:
            renamed[f"{STAGES[match[1]]}.{match[2]}"] = value
        elif HEAD.fullmatch(key):
            dropped.append(key)
        else:
            unknown.append(key)
    if unknown:
        raise CheckpointError(
            f"{where}: unknown keys {tensors.some(unknown)}. It is not one of the authors' ResNet "
            "checkpoints; nothing was converted"
        )
    return renamed, dropped


def convert(source, out, *, normalisation: str | None = None, px: int = 224) -> dict:
    """Convert the authors' .pth file into an exported folder and return its config.

    normalisation: 'meta_uscl' (0.18 / 0.24) or 'uscl' (0.5 / 0.25), what the weights were trained with; by
    default 'uscl' if the file has that older code's `linear` or `fc` head. px: the input size to recommend.
    Raises CheckpointError if a key is unknown or missing, FileExistsError if out exists and is not empty.

    >>> import tempfile, torchvision
    >>> folder = Path(tempfile.mkdtemp())
    >>> theirs = torch.nn.Sequential(*list(torchvision.models.resnet18().children())[:-1])
    >>> torch.save({f"features.{name}": value for name, value in theirs.state_dict().items()}, folder / "official.pth")
    >>> convert(folder / "official.pth", folder / "ours")["architecture"]
    'resnet18'
    """
    state, dropped = rename(read_pth(source), source)
    model = _closest(state)
    architecture = model.pretrained_cfg["architecture"]
    expected = model.state_dict()
    missing, extra = [k for k in expected if k not in state], [k for k in state if k not in expected]
    if missing or extra:
        parts = [f"lacks {tensors.some(missing)}"] * bool(missing)
        parts += [f"has unknown {tensors.some(extra)}"] * bool(extra)
        raise CheckpointError(
            f"{source}: closest to a {architecture}, but {' and '.join(parts)} (in our names). Nothing was converted"
        )
    tensors.check_shapes({name: tuple(value.shape) for name, value in state.items()}, model, source)
    state = tensors.check_values(state, model, where=source)
    if normalisation is None:
        normalisation = "uscl" if any(k.startswith(("linear.", "fc.")) for k in dropped) else "meta_uscl"
    mean, std = NORMALISATION[normalisation]
    origin = {
        "meta_uscl": "https://github.com/Schuture/Meta-USCL",
        "uscl": "https://github.com/983632847/USCL",
    }
    cfg = registry.make_cfg(px, mean, std, architecture=architecture, origin_url=origin[normalisation], license="other")
    if normalisation == "uscl":
        cfg.update(
            paper_name="USCL: Pretraining Deep Ultrasound Image Diagnosis Model through Video Contrastive "
            "Representation Learning",
            paper_ids="arXiv:2011.13066",
        )
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": model.num_features,
        "pretrained_cfg": cfg,
        "uscl_hub": {
            "method": normalisation,
            "converted_from": Path(source).name,
            "converted_sha256": sha256(source),
            "dropped": dropped,
            "version": __version__,
        },
    }
    checkpoints.save_folder(out, state, config, _card(architecture, normalisation, Path(source).name))
    return config


def _closest(state: dict[str, torch.Tensor]):
    """The ResNet, on the meta device, whose names and shapes differ least from the state dict's."""
    with torch.device("meta"):
        plain = [ours.timm for ours in registry.ARCHITECTURES.values() if ours.timm.startswith("resnet")]
        networks = [timm.create_model(name, num_classes=0) for name in plain]

    def distance(model):
        expected = model.state_dict()
        shared = [k for k in state if k in expected]
        return len(set(expected) ^ set(state)) + sum(state[k].shape != expected[k].shape for k in shared)

    return min(networks, key=distance)


def _card(architecture: str, method: str, name: str) -> str:
    name = re.sub(r"[^\w. -]", "_", name)  # a file may be called anything, and this is Markdown
    return f"""---
library_name: timm
tags: [image-feature-extraction, timm, ultrasound]
license: other
---
# {architecture} converted from `{name}`

The encoder of the authors' {"Meta-USCL" if method == "meta_uscl" else "USCL"} checkpoint, converted with
`uscl-hub convert`. The projection head was dropped. The authors' terms apply to the weights. Not a medical
device.

```python
import timm
model = timm.create_model('local-dir:FOLDER', pretrained=True, num_classes=0)
```
"""
