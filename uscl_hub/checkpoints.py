"""Checkpoint files: safetensors only, checked before a single weight is used.

Every error is a CheckpointError that names the file and says what to do. Nothing here ever unpickles.
"""

import json
import math
import os
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import torch

from uscl_hub.errors import UserError
from uscl_hub.files import sha256

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = "model.safetensors", "config.json", "README.md"
MAX_HEADER = 10 << 20  # bytes, also of config.json; a ResNet's header is about 20 kB
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
# What a config.json may not decide: where weights are loaded from (the folder that it lies in), and how.
SOURCES = {"url", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load"}
CREATE_MODEL = {
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "features_only",
}


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, damaged or not what it should be."""


def check_sha256(path, expected: str) -> None:
    """Raise CheckpointError if the file's SHA-256 is not the expected one."""
    try:
        found = sha256(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file. Check the path") from None
    if found != expected.lower():
        raise CheckpointError(
            f"{path}: its SHA-256 is {found}, expected {expected}. The file is damaged or not the "
            "released one: delete it and install or download it again"
        )


def read_header(path) -> dict[str, dict]:
    """Names -> {'dtype', 'shape', 'data_offsets'} of a safetensors file, read without touching the data.

    Raises CheckpointError if the file is missing or cannot be a whole, well-formed safetensors file.
    """
    path = Path(path)

    def bad(why, do="Download or export it again"):
        return CheckpointError(f"{path}: {why}. {do}")

    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            start = f.read(8)
            if len(start) < 8:
                raise bad(f"has {size} bytes, too few for a safetensors file")
            length = int.from_bytes(start, "little")
            if length > size - 8 and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
                raise bad(
                    "is a PyTorch pickle, whatever its name says; only safetensors are loaded",
                    "If these are the authors' weights, run `uscl-hub convert` on it first",
                )
            if length > size - 8:
                raise bad(f"claims a header of {length} bytes but has only {size}: truncated or not safetensors")
            if length > MAX_HEADER:
                raise bad(f"has a header of {length} bytes, more than the {MAX_HEADER} allowed")
            text = f.read(length)
    except FileNotFoundError:
        raise bad("no such file", "Check the path") from None
    except OSError as error:
        raise bad(f"cannot be read ({error.strerror})", "Check that it is a readable file") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise bad("its header is not JSON: not a safetensors file, or damaged") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object: damaged")
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        try:
            count, (begin, end) = math.prod(entry["shape"]), entry["data_offsets"]
            fits = min([0, *entry["shape"]]) == 0 and end - begin == count * ITEM_BYTES[entry["dtype"]]
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise bad(f"the entry of {name!r} in its header makes no sense: damaged")
        spans.append((begin, end))
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise bad("its tensors overlap or leave gaps: damaged")
        position = end
    if position != size - 8 - length:
        raise bad(f"has {size - 8 - length} bytes of data where its header says {position}: truncated or damaged")
    return header


def load_tensors(path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError as `read_header` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: {error}. Download or export it again") from error


def check_for_model(state_dict, model, *, where="the checkpoint", num_classes=0, in_chans=3):
    """The pretrained_filter_fn of our models: return state_dict, in float32, if it fits the model, else
    raise.

    The backbone must be complete and of the right shapes, with nothing else but the classifier of a
    checkpoint that has one (num_classes > 0), and without NaN. timm loads non-strictly as soon as the number
    of classes differs, so that this is the only guard against weights that silently stay random. in_chans is
    the checkpoint's; timm adapts the first convolution afterwards.
    """
    cfg = getattr(model, "pretrained_cfg", None) or {}
    head = tuple(f"{name}." for name in _names(cfg.get("classifier", "fc")))
    stem = tuple(f"{name}.weight" for name in _names(cfg.get("first_conv", "conv1")))
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    missing = [k for k in expected if k not in state_dict and not k.startswith(head)]
    extra = [k for k in state_dict if (not num_classes if k.startswith(head) else k not in expected)]
    if any(k.startswith(("features.", "module.features.")) for k in extra):
        raise CheckpointError(
            f"{where}: has the authors' legacy key names (features.*): run `uscl-hub convert` on the original .pth file"
        )
    if missing or extra:
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has unknown {_some(extra)}"] * bool(extra)
        raise CheckpointError(
            f"{where}: {' and '.join(parts)}. It is not a checkpoint of this architecture "
            f"({cfg.get('architecture', type(model).__name__)}): check the name"
        )
    wrong = []
    for k, v in state_dict.items():
        want = expected.get(k)
        if k.startswith(head):
            want = (num_classes, *v.shape[1:])
        elif k in stem:
            want = (want[0], in_chans, *want[2:])
        if tuple(v.shape) != want:
            wrong.append(f"{k} {tuple(v.shape)} instead of {want}")
    if wrong:
        raise CheckpointError(f"{where}: wrong shapes: {_some(wrong)}. Check the architecture and input channels")
    bad = [
        k
        for k, v in state_dict.items()
        if v.device.type != "meta" and v.is_floating_point() and not torch.isfinite(v).all()
    ]
    if bad:
        raise CheckpointError(f"{where}: NaN or infinite values in {_some(bad)}. Export it again from a sound run")
    # to float32 before timm sums the first convolution's channels: it would round the sums to 16 bit again
    return {k: v.float() if v.dtype in (torch.float16, torch.bfloat16) else v for k, v in state_dict.items()}


def _names(value) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def locate(variant: str, cfg, cache_dir=None) -> Path:
    """The local, whole safetensors file of a timm PretrainedCfg: packaged, else local, else from the Hub.

    A file that we released is checked against its SHA-256. Raises CheckpointError.
    """
    from uscl_hub import hub, models

    if cfg.source == "local-dir":
        path = Path(cfg.file) / WEIGHTS_NAME
        read_header(path)
        return path
    name = f"{cfg.architecture or variant}.{cfg.tag}" if cfg.tag else variant
    entry = models.releases().get(name)
    packaged = models.WEIGHTS / entry["file"] if entry and entry.get("file") else None
    if cfg.file and not (Path(cfg.file) == packaged and not packaged.exists() and cfg.hf_hub_id):
        path = Path(cfg.file)
        if path == packaged and not path.exists():
            raise CheckpointError(f"{path}: the packaged weights of {name} are missing. Install uscl-hub again")
        released = path == packaged
    elif cfg.hf_hub_id:
        repo, _, revision = cfg.hf_hub_id.partition("@")
        path = hub.fetch(repo, cfg.hf_hub_filename or WEIGHTS_NAME, revision or None, cache_dir)
        released = entry is not None and cfg.hf_hub_id == entry.get("hub_id")
    elif cfg.url:
        raise CheckpointError(
            f"{cfg.url}: weights are not loaded from a URL. Download the .safetensors file and "
            "pass its path as checkpoint"
        )
    else:
        others = [n for n in models.releases() if n.split(".")[0] != variant]
        raise CheckpointError(
            f"{variant}: no pretrained weights have been released for it yet. "
            + (f"Released: {', '.join(others)}. " if others else "")
            + "Train some (python training/run.py) and load the exported folder with load_meta_uscl_backbone("
            "checkpoint=FOLDER), or pass pretrained=False for random weights"
        )
    if released:
        check_sha256(path, entry["sha256"])
    read_header(path)
    return path


def read_config(folder) -> tuple[dict, str, dict, dict]:
    """An exported folder's config.json -> (pretrained_cfg, architecture, model_args, the whole file).

    pretrained_cfg points at the folder. Raises CheckpointError if timm could not make a model of it.
    """
    from timm.models import PretrainedCfg
    from timm.models._hub import load_model_config_from_path

    path = Path(folder) / CONFIG_NAME
    try:
        if path.stat().st_size > MAX_HEADER:
            raise CheckpointError(f"{path}: is too large for a configuration. Export the folder again")
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file. An exported folder has {CONFIG_NAME} and {WEIGHTS_NAME}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not readable JSON ({error}). Export the folder again") from error
    if (
        not isinstance(config, dict)
        or not isinstance(config.get("architecture"), str)
        or not isinstance(config.get("pretrained_cfg"), dict)
    ):
        raise CheckpointError(f"{path}: needs 'architecture' and a 'pretrained_cfg' table. Export the folder again")
    if unknown := sorted(set(config["pretrained_cfg"]) - {f.name for f in fields(PretrainedCfg)}):
        raise CheckpointError(f"{path}: pretrained_cfg has keys that timm refuses: {_some(unknown)}. Remove them")
    size = config["pretrained_cfg"].get("input_size")
    if not (isinstance(size, list) and len(size) == 3 and all(isinstance(s, int) and 0 < s <= 65536 for s in size)):
        raise CheckpointError(f"{path}: pretrained_cfg.input_size is {size!r}, expected [channels, height, width]")
    for key in ("mean", "std", "first_conv", "classifier"):
        value = config["pretrained_cfg"].get(key)
        values = value if isinstance(value, list) else [value]
        if key in ("mean", "std"):
            good = all(isinstance(v, (int, float)) and math.isfinite(v) and (v > 0 or key == "mean") for v in values)
        else:
            good = all(isinstance(v, str) for v in values)
        if not (good or value is None):
            raise CheckpointError(f"{path}: pretrained_cfg.{key} is {value!r}. Export the folder again")
    arguments = config.get("model_args", {})
    if not isinstance(arguments, dict) or (taken := sorted(arguments.keys() & CREATE_MODEL)):
        what = ", ".join(taken) if isinstance(arguments, dict) else repr(arguments)
        raise CheckpointError(f"{path}: model_args may hold the architecture's own arguments only, not {what}")
    try:
        cfg, architecture, model_args = load_model_config_from_path(folder)
        PretrainedCfg(**cfg)
        num_classes = cfg.get("num_classes", 0)
        if not isinstance(num_classes, int) or not 0 <= num_classes < 1_000_000:
            raise ValueError(f"num_classes is {num_classes!r}")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path}: timm cannot use it ({error}). Export the folder again") from error
    cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k not in SOURCES}
    return cfg, architecture, model_args, config


def check_provenance(folder, config: dict) -> None:
    """Raise CheckpointError if the weights are not those that the folder's config.json was written with.

    A folder whose provenance has no hash, one that another program exported, passes.
    """
    provenance = config.get("uscl_hub")
    if isinstance(provenance, dict) and isinstance(provenance.get("sha256"), str):
        check_sha256(Path(folder) / WEIGHTS_NAME, provenance["sha256"])


def check_folder(folder) -> dict:
    """Check an exported folder's schema, hash (where its provenance has one), keys, shapes and values.

    Returns the whole config.json. Raises CheckpointError at the first fault.
    """
    import timm

    cfg, architecture, model_args, config = read_config(folder)
    path = Path(folder) / WEIGHTS_NAME
    check_provenance(folder, config)
    if not timm.is_model(architecture):
        raise CheckpointError(
            f"{Path(folder) / CONFIG_NAME}: timm knows no architecture {architecture!r}. "
            "Install the version of timm that it was exported with"
        )
    num_classes, in_chans = cfg.get("num_classes", 0), cfg["input_size"][0]
    arguments = {**model_args, "num_classes": num_classes, "in_chans": in_chans}
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, pretrained_cfg={**cfg, "source": None, "file": None}, **arguments)
    except Exception as error:  # the constructors raise anything on arguments that make no sense
        raise CheckpointError(
            f"{Path(folder) / CONFIG_NAME}: timm cannot make a {architecture} of its model_args {model_args} "
            f"({type(error).__name__}: {error}). Export the folder again"
        ) from error
    check_for_model(load_tensors(path), model, where=path, num_classes=num_classes, in_chans=in_chans)
    return config


def save_tensors(state_dict: dict[str, torch.Tensor], path) -> None:
    """Write a safetensors file as timm does. Raises OSError."""
    from safetensors.torch import save

    content = save({k: v.detach().cpu().contiguous() for k, v in state_dict.items()}, metadata={"format": "pt"})
    try:
        Path(path).write_bytes(content)  # a file that save_file makes, only its owner may read
    except OSError as error:
        raise OSError(error.errno, f"{path}: cannot be written ({error.strerror})") from error


def save_folder(folder, state_dict: dict, config: dict, card: str) -> Path:
    """Write model.safetensors, config.json and README.md as a new folder, whole or not at all.

    The config's provenance ('uscl_hub'), if it has one, gets the weights' SHA-256. Raises FileExistsError if the
    folder exists and is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty. Choose another output folder, or remove it")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        save_tensors(state_dict, draft / WEIGHTS_NAME)
        if isinstance(config.get("uscl_hub"), dict):
            config = {**config, "uscl_hub": {"sha256": sha256(draft / WEIGHTS_NAME), **config["uscl_hub"]}}
        (draft / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (draft / CARD_NAME).write_text(card, encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp's 0700 is not what anyone expects of a result
        os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return folder
