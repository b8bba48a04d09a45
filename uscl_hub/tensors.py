"""Files of weights: safetensors only, checked before a single weight is used.

Every error is a CheckpointError that names the file and says what to do. Nothing here ever unpickles.
"""

import os
from pathlib import Path

import torch

from uscl_hub.errors import CheckpointError, printable
from uscl_hub.files import NotAFile, open_regular, sha256

MAX_HEADER = 10 << 20  # bytes; a ResNet's header is about 20 kB, and the safetensors library allows 100 MB
MAX_TENSORS = 20_000  # of one network; the largest of timm have 3,000
MAX_WEIGHT = 1e18  # the product of two larger ones is infinite in float32


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
    """Names -> {'dtype', 'shape'} of a safetensors file, read without its data.

    Raises CheckpointError if the file is missing or cannot be a whole, well-formed safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    def bad(why, do="Download or export it again"):
        return CheckpointError(f"{path}: {why}. {do}")

    try:
        with open_regular(path) as file:
            size, start = os.fstat(file.fileno()).st_size, file.read(8)
    except FileNotFoundError:
        raise bad("no such file", "Check the path") from None
    except NotAFile as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise bad(f"cannot be read ({error.strerror})", "Check that it is a readable file") from error
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
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            header = {name: {"dtype": s.get_dtype(), "shape": s.get_shape()} for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise bad(f"is damaged or not a safetensors file ({one_line(error)})") from error
    if len(header) > MAX_TENSORS:
        raise bad(f"holds {len(header)} tensors, more than any network has", "Check the path")
    return header


def read_shapes(path) -> dict[str, tuple[int, ...]]:
    """Names -> shapes of a safetensors file, without the prefixes of torch.compile and DataParallel.

    Raises CheckpointError as `read_header` does.
    """
    return clean({name: tuple(entry["shape"]) for name, entry in read_header(path).items()}, path)


def clean(state: dict, where) -> dict:
    """The state dict without the prefixes that torch.compile and DataParallel put before its names."""
    from timm.models import clean_state_dict

    cleaned = clean_state_dict(state)
    if len(cleaned) < len(state):
        raise CheckpointError(f"{where}: has names twice, with and without 'module.' or '_orig_mod.'. Export it again")
    return cleaned


def load_tensors(path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, on the CPU. Raises CheckpointError as `read_header` does."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: {one_line(error)}. Download or export it again") from error


def check_shapes(shapes: dict[str, tuple[int, ...]], model, where) -> None:
    """Raise CheckpointError unless these are exactly the names and shapes of the model's state dict.

    model: of the checkpoint's own channels and classes, best on the meta device, where it costs nothing: so that no
    more is ever built than the checkpoint has weights for. timm loads non-strictly as soon as the number of classes
    differs: this is the only guard against weights that silently stay random.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing, extra = [k for k in expected if k not in shapes], [k for k in shapes if k not in expected]
    if any(k.startswith("features.") for k in extra):
        raise CheckpointError(
            f"{where}: has the authors' legacy key names (features.*): run `uscl-hub convert` on the original .pth file"
        )
    if missing or extra:
        architecture = (getattr(model, "pretrained_cfg", None) or {}).get("architecture", type(model).__name__)
        parts = [f"lacks {some(missing)}"] * bool(missing) + [f"has unknown {some(extra)}"] * bool(extra)
        raise CheckpointError(
            f"{where}: {' and '.join(parts)}. It is not a checkpoint of this architecture ({architecture}): "
            "check the name"
        )
    if wrong := [f"{k} {tuple(v)} instead of {expected[k]}" for k, v in shapes.items() if tuple(v) != expected[k]]:
        raise CheckpointError(f"{where}: wrong shapes: {some(wrong)}. Check the architecture and input channels")


def check_values(state_dict: dict[str, torch.Tensor], model, *, where) -> dict[str, torch.Tensor]:
    """The pretrained_filter_fn of our models: the state dict, cast to the model's dtypes, if it can be used.

    Raises CheckpointError where values are not finite after the cast, or too large to calculate with, where variances
    are negative, and where there are no real numbers at all.
    """
    dtypes = {name: value.dtype for name, value in model.state_dict().items()}
    usual = next((dtype for dtype in dtypes.values() if dtype.is_floating_point), torch.float32)
    # to the dtype of the model before timm sums the first convolution's channels: it would round the sums to 16 bit
    cast = {}
    for name, value in state_dict.items():
        want = dtypes.get(name, usual if value.is_floating_point() else value.dtype)
        if not is_plain(value) or want.is_floating_point and not value.is_floating_point():
            raise CheckpointError(f"{where}: {name} does not hold plain floating point numbers. Export it again")
        cast[name] = value.to(want) if want.is_floating_point else value
    if bad := not_finite(cast):
        raise CheckpointError(
            f"{where}: NaN, infinite or absurdly large values in {some(bad)}. Export it again from a sound run"
        )
    if bad := [k for k, v in cast.items() if k.endswith("running_var") and v.numel() and v.min() < 0]:
        raise CheckpointError(f"{where}: negative variances in {some(bad)}. Export it again from a sound run")
    return cast


def is_plain(value: torch.Tensor) -> bool:
    """Whether a tensor has its real numbers in memory, one after the other."""
    odd = value.is_nested or value.is_quantized or value.is_complex()
    return value.layout == torch.strided and value.device.type != "meta" and not odd


def not_finite(state_dict: dict[str, torch.Tensor]) -> list[str]:
    """Names of what a network cannot calculate with: NaN, infinite values, and those beyond 1e18."""
    bad = []
    for name, value in state_dict.items():
        if value.is_floating_point() and value.numel():
            low, high = torch.aminmax(value if value.dtype.itemsize > 1 else value.float())
            if not (low >= -MAX_WEIGHT and high <= MAX_WEIGHT):  # also where they are NaN
                bad.append(name)
    return bad


def save_tensors(state_dict: dict[str, torch.Tensor], path) -> None:
    """Write a safetensors file as timm does. Raises OSError."""
    from safetensors.torch import save

    content = save({k: v.detach().cpu().contiguous() for k, v in state_dict.items()}, metadata={"format": "pt"})
    try:
        Path(path).write_bytes(content)  # a file that save_file makes, only its owner may read
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from error  # also where it has no name: a full disk


def one_line(error) -> str:
    """What an exception of another library says, in one line that is not too long."""
    return shorten(" ".join(str(error).split())) or type(error).__name__


def shorten(text: str, length: int = 300) -> str:
    """Printable text of at most about `length` characters: what a file says may be of any length."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length // 2]} ... {text[-length // 2 :]}"


def some(names: list[str], limit: int = 5) -> str:
    shown = ", ".join(shorten(str(name)) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
