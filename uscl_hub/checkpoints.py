"""Exported folders: model.safetensors, config.json and README.md, as timm's Hub format has them, checked and written.

Every error is a CheckpointError that names the file and says what to do.
"""

import json
import os
import re
import reprlib
import shutil
import tempfile
import threading
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Callable

import torch

from uscl_hub.errors import CheckpointError
from uscl_hub.files import NotAFile, open_regular, sha256, write_text, write_whole
from uscl_hub.tensors import (  # noqa: F401  (also names of version 0.1)
    check_sha256,
    check_shapes,
    check_values,
    clean,
    load_tensors,
    not_finite,
    one_line,
    read_header,
    save_tensors,
    shorten,
    some,
)

WEIGHTS_NAME, CONFIG_NAME, CARD_NAME = "model.safetensors", "config.json", "README.md"
MAX_CONFIG = 10 << 20  # bytes
MAX_ARGUMENT = 65_536  # in model_args: no network has more layers, or layers of more units
# What a config.json may not decide: where weights are loaded from (the folder that it lies in), and how.
SOURCES = {"url", "state_dict", "hf_hub_id", "hf_hub_filename", "custom_load"}
CREATE_MODEL = {
    *("model_name", "variant", "model_cls", "model_cfg", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"),
    *("pretrained_strict", "pretrained_filter_fn", "checkpoint_path", "cache_dir", "kwargs_filter", "device", "dtype"),
    *("features_only", "feature_cfg", "feature_cls", "out_indices", "scriptable", "exportable", "no_jit"),
}


def _number(low, high):
    return lambda value: type(value) in (int, float) and low <= value <= high  # NaN is neither


def _whole(low, high):
    return lambda value: type(value) is int and low <= value <= high


def _list(test, *lengths):
    return lambda value: isinstance(value, list) and (not lengths or len(value) in lengths) and all(map(test, value))


def _text(value):
    return isinstance(value, str)


def _text_or_list(value):
    return _text(value) or _list(_text)(value)


_SIZE = _list(_whole(1, 65_536), 3)
# Keys of pretrained_cfg that are used here or by timm: what they may be, in words, and the test of it.
KEYS = {
    "input_size": ("[channels, height, width]", _SIZE),
    "test_input_size": ("[channels, height, width]", _SIZE),
    "min_input_size": ("[channels, height, width]", _SIZE),
    "pool_size": ("[height, width]", _list(_whole(1, 65_536), 2)),
    "test_pool_size": ("[height, width]", _list(_whole(1, 65_536), 2)),
    "fixed_input_size": ("true or false", lambda value: isinstance(value, bool)),
    "interpolation": ("a name", _text),
    "crop_mode": ("a name", _text),
    "crop_pct": ("a number above 0", _number(1e-6, 100)),
    "test_crop_pct": ("a number above 0", _number(1e-6, 100)),
    "mean": ("a number, or one a channel", lambda value: _numbers(value, _number(-1e6, 1e6))),
    "std": ("a number above 0, or one a channel", lambda value: _numbers(value, _number(1e-6, 1e6))),
    "num_classes": ("a whole number from 0 to 1,000,000", _whole(0, 1_000_000)),
    "label_offset": ("0 or nothing", _whole(0, 0)),
    "first_conv": ("a name or a list of names", _text_or_list),
    "classifier": ("a name or a list of names", _text_or_list),
    "architecture": ("a name", _text),
    "tag": ("a name", _text),
    "license": ("a name", _text),
}
NEEDED = ("input_size", "mean", "std")  # of null or nothing timm would make ImageNet's


def _numbers(value, test) -> bool:
    return test(value) or isinstance(value, list) and len(value) > 0 and all(map(test, value))


def read_config(folder) -> tuple[dict, str, dict, dict]:
    """An exported folder's config.json -> (pretrained_cfg, architecture, model_args, the whole file).

    pretrained_cfg points at the folder. Raises CheckpointError if timm could not make a model of it.
    """
    from timm.models import PretrainedCfg
    from timm.models._hub import load_model_config_from_path

    path = Path(folder) / CONFIG_NAME
    config = _read_json(path)
    _check_config(config, path)
    try:
        cfg, architecture, model_args = load_model_config_from_path(folder)
        PretrainedCfg(**cfg)
    except (TypeError, ValueError, KeyError, AttributeError, OSError) as error:
        raise CheckpointError(f"{path}: timm cannot use it ({one_line(error)}). Export the folder again") from error
    _check_keys(cfg, path)  # once more: timm has taken some from outside pretrained_cfg
    cfg = {k: tuple(v) if isinstance(v, list) else v for k, v in cfg.items() if k not in SOURCES}
    if known := _registered(architecture):  # the architecture decides what its layers are called
        fixed = bool(cfg.get("fixed_input_size")) and known.fixed_input_size
        cfg.update(first_conv=known.first_conv, classifier=known.classifier, fixed_input_size=fixed)
    for key in ("mean", "std"):
        values = cfg[key] if isinstance(cfg[key], tuple) else (cfg[key],)
        cfg[key] = values[:1] * cfg["input_size"][0] if len(set(values)) == 1 else values
    return cfg, architecture, model_args, config


def _read_json(path: Path):
    try:
        with open_regular(path) as file:
            content = file.read(MAX_CONFIG + 1)
        if len(content) > MAX_CONFIG:
            raise CheckpointError(f"{path}: is too large for a configuration. Export the folder again")
        return json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no such file. An exported folder has {CONFIG_NAME} and {WEIGHTS_NAME}"
        ) from None
    except NotAFile as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}). Check that it is a readable file") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is not readable JSON ({one_line(error)}). Export the folder again") from error


def _wrong(path, key, value, expected) -> CheckpointError:
    found = "null" if value is None else reprlib.repr(value)
    return CheckpointError(f"{path}: {key} is {found}, expected {expected}. Export the folder again")


def _check_config(config, path: Path) -> None:
    """Raise CheckpointError unless everything in the file that is used has a type and a range that can be used."""
    from timm.models import PretrainedCfg

    if not isinstance(config, dict) or not _text(config.get("architecture")):
        raise CheckpointError(f"{path}: needs 'architecture' and a 'pretrained_cfg' table. Export the folder again")
    cfg, arguments, about = config.get("pretrained_cfg"), config.get("model_args", {}), config.get("uscl_hub", {})
    if not isinstance(cfg, dict):
        raise _wrong(path, "pretrained_cfg", cfg, "a table")
    if unknown := sorted(set(cfg) - {f.name for f in fields(PretrainedCfg)}):
        raise CheckpointError(f"{path}: pretrained_cfg has keys that timm refuses: {some(unknown)}. Remove them")
    _check_keys(cfg, path)
    if "num_classes" in config and not KEYS["num_classes"][1](config["num_classes"]):
        raise _wrong(path, "num_classes", config["num_classes"], KEYS["num_classes"][0])
    if not isinstance(arguments, dict) or (taken := sorted(arguments.keys() & CREATE_MODEL)):
        what = ", ".join(taken) if isinstance(arguments, dict) else reprlib.repr(arguments)
        raise CheckpointError(f"{path}: model_args may hold the architecture's own arguments only, not {what}")
    if not isinstance(about, dict):
        raise _wrong(path, "uscl_hub", about, "a table")
    if not re.fullmatch("[0-9a-fA-F]{64}", str(about.get("sha256") or "0" * 64)):
        raise _wrong(path, "uscl_hub.sha256", about["sha256"], "64 hexadecimal digits")
    # timm drops what is called the classifier as soon as the number of classes differs: it must be no other layer
    architecture, named = config["architecture"], cfg.get("classifier")
    known = _registered(architecture)
    if known is not None and named is not None and _names(named) != _names(known.classifier):
        raise _wrong(path, "pretrained_cfg.classifier", named, f"{known.classifier!r}, a {architecture}'s")


def _check_keys(cfg: dict, path: Path) -> None:
    cfg = {key: list(value) if isinstance(value, tuple) else value for key, value in cfg.items()}
    for key, (expected, test) in KEYS.items():
        value = cfg.get(key)
        if not test(value) and (value is not None or key in NEEDED):
            raise _wrong(path, f"pretrained_cfg.{key}", value, expected)
    channels = cfg["input_size"][0]
    for key in ("mean", "std"):
        if isinstance(cfg[key], list) and len(set(cfg[key])) > 1 and len(cfg[key]) != channels:
            raise _wrong(path, f"pretrained_cfg.{key}", cfg[key], f"a number, or one for each of {channels} channels")


def _registered(architecture: str):
    """timm's own pretrained_cfg of an architecture, None where it has none."""
    from timm.models import get_pretrained_cfg, is_model

    plain = architecture.partition(".")[0]
    return get_pretrained_cfg(plain, allow_unregistered=True) if is_model(plain) else None


def _names(value) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def check_provenance(folder, config: dict) -> None:
    """Raise CheckpointError if the weights are not those that the folder's config.json was written with.

    A folder whose provenance has no hash, one that another program exported, passes.
    """
    about = config.get("uscl_hub")
    if isinstance(about, dict) and about.get("sha256"):
        check_sha256(Path(folder) / WEIGHTS_NAME, about["sha256"])


def check_folder(folder) -> dict:
    """Check an exported folder's schema, hash (where its provenance has one), keys, shapes and values.

    Returns the whole config.json. Raises CheckpointError at the first fault.
    """
    cfg, architecture, model_args, config = read_config(folder)
    path = Path(folder) / WEIGHTS_NAME
    check_provenance(folder, config)
    shapes = clean({name: tuple(entry["shape"]) for name, entry in read_header(path).items()}, path)
    model = _on_meta(Path(folder) / CONFIG_NAME, architecture, cfg, model_args, len(shapes))
    check_shapes(shapes, model, path)
    check_values(clean(load_tensors(path), path), model, where=path)
    return config


def _on_meta(path, architecture: str, cfg: dict, model_args: dict, tensors: int):
    """The model of a config.json, without memory for its weights, and given up once it has more than the file."""
    import timm

    if not timm.is_model(architecture):
        raise CheckpointError(
            f"{path}: timm knows no architecture {shorten(architecture)!r}. "
            "Install the version of timm that it was exported with"
        )
    arguments = {**model_args, "num_classes": cfg.get("num_classes", 0), "in_chans": cfg["input_size"][0]}
    try:
        _check_arguments(model_args)
        with torch.device("meta"), _at_most(2 * tensors + 100):  # some layers are made twice
            return timm.create_model(architecture, pretrained_cfg={**cfg, "source": None, "file": None}, **arguments)
    except Exception as error:  # the constructors raise anything on arguments that make no sense
        raise CheckpointError(
            f"{path}: timm cannot make a {architecture} of its model_args {reprlib.repr(model_args)} "
            f"({type(error).__name__}: {one_line(error)}). Export the folder again"
        ) from error


def _check_arguments(value) -> None:
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_arguments(part)
    if isinstance(value, (int, float)) and not abs(value) <= MAX_ARGUMENT:
        raise ValueError(f"{reprlib.repr(value)} is more than any network has")


@contextmanager
def _at_most(parameters: int):
    """Stop building networks in this thread that have more parameter tensors: a config could ask for any number."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    count, thread = 0, threading.get_ident()

    def hook(module, name, parameter):
        nonlocal count
        count += threading.get_ident() == thread
        if count > parameters:
            raise ValueError("it asks for more layers than the weights' file has")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def replace_folder(folder, state_dict: dict, config: Callable[[str], dict], card: Callable[[dict], str]) -> None:
    """Write model.safetensors, config.json and README.md into a folder, which is made; older ones are replaced one by
    one, each whole.

    Args:
        config: makes what config.json holds of the weights' SHA-256.
        card: makes README.md's text of that.

    Raises CheckpointError if a weight is not finite: nothing is written.
    """
    if bad := not_finite(state_dict):
        raise CheckpointError(f"{folder}: weights are not finite in {some(bad)}: nothing is written")
    _write(Path(folder), state_dict, config, card)


def _write(folder: Path, state_dict: dict, config: Callable[[str], dict], card: Callable[[dict], str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS_NAME, lambda path: save_tensors(state_dict, path))
    content = config(sha256(folder / WEIGHTS_NAME))
    write_text(folder / CONFIG_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / CARD_NAME, card(content))


def save_folder(folder, state_dict: dict, config: dict, card: str) -> Path:
    """Write model.safetensors, config.json and README.md as a new folder, whole or not at all.

    The config's provenance ('uscl_hub'), if it has one, gets the weights' SHA-256. Raises FileExistsError if the
    folder exists and is not empty.
    """
    folder = Path(os.path.realpath(folder)) if os.path.islink(folder) else Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not empty. Choose another output folder, or remove it")
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)

    def with_digest(digest: str) -> dict:
        known = config.get("uscl_hub")
        return {**config, "uscl_hub": {"sha256": digest, **known}} if isinstance(known, dict) else config

    draft = None
    try:
        draft = Path(tempfile.mkdtemp(prefix=f".{folder.name[:40]}.", dir=folder.absolute().parent))
        _write(draft, state_dict, with_digest, lambda _: card)
        draft.chmod(0o755)  # mkdtemp's 0700 is not what anyone expects of a result
        os.replace(draft, folder)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(error.errno, error.strerror, str(folder)) from error  # the name that the user knows
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
    return folder
