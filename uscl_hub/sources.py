"""From any string to a file of weights: the only place that decides what a name means and where weights come from."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from uscl_hub import hub, registry
from uscl_hub.checkpoints import CONFIG_NAME, WEIGHTS_NAME
from uscl_hub.errors import CheckpointError
from uscl_hub.files import NotAFile, check_regular
from uscl_hub.tensors import check_sha256, shorten

HUB = "hf-hub:"


@dataclass(frozen=True)
class Source:
    """Where weights are: of a release (its full name), in an exported folder, or in a lone safetensors file.

    Both folder and file are given where the file is that of an exported folder.
    """

    release: str | None = None
    folder: Path | None = None
    file: Path | None = None


def find(what, name: str = registry.DEFAULT, revision: str | None = None, cache_dir=None) -> Source:
    """What a person means by a checkpoint, looked for in this order.

    what: a released tag ('nc', or 'meta_uscl_resnet18.nc'), a .safetensors file, an exported folder, or a Hub id
    'org/name', which 'hf-hub:org/name' says beyond doubt. A Path is never a Hub id. name: of the model, for short tags.
    Raises CheckpointError if there is no such thing, ValueError for a revision of what is not on the Hub.
    """
    if not isinstance(what, (str, os.PathLike)):
        raise TypeError(f"checkpoint is {what!r}, expected a released tag, a path or a Hub id org/name")
    text, path = str(what), Path(os.path.expanduser(what))
    if not os.fspath(what):
        raise CheckpointError("the checkpoint's name is empty: give a released tag, a path or a Hub id org/name")
    if isinstance(what, str):
        if tag := _release(text, name):
            return Source(release=_local(tag, revision))
        if text.startswith(HUB) and hub.is_repo_id(text.removeprefix(HUB).partition("@")[0]):
            repo, _, commit = text.removeprefix(HUB).partition("@")
            return Source(folder=hub.fetch_folder(repo, revision or commit or None, cache_dir))
    if os.path.isdir(path):
        return Source(folder=_local(path, revision))
    if os.path.exists(path):
        try:
            check_regular(path)
        except NotAFile as error:
            raise CheckpointError(str(error)) from None
        if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).exists():
            return Source(folder=_local(path.parent, revision), file=path)
        return Source(file=_local(path, revision))
    if isinstance(what, str) and _is_for_the_hub(text):
        return Source(folder=hub.fetch_folder(text, revision, cache_dir))
    released = ", ".join(registry.releases()) or "none yet"
    raise CheckpointError(
        f"{shorten(text)}: neither a released tag ({released}), nor an existing .safetensors file or exported folder, "
        "nor a Hub id of the form org/name"
    )


def _local(found, revision):
    if revision is not None:
        raise ValueError(f"{found} is local; revision only applies to a checkpoint on the Hub (org/name)")
    return found


def _is_for_the_hub(text: str) -> bool:
    """Whether a string that is no path here is asked of the Hub, which must not learn of people's paths."""
    if not hub.is_repo_id(text) or re.search(r"\.(safetensors|pth?|json|md)$", text):
        return False
    owner = text.partition("/")[0]
    if os.path.isdir(owner):
        raise CheckpointError(
            f"{text}: no such file or folder. {owner} is a folder here, so this is taken for a path; "
            f"if a repository on the Hub is meant, write {HUB}{text}"
        )
    return True


def settle(what, name: str = registry.DEFAULT):
    """A checkpoint that `find` has found, so that it is found again from any other folder: of a local path the absolute
    one, of a repository on the Hub hf-hub:org/name, else as it is."""
    if what is None or is_beyond_doubt(what, name):
        return what
    if os.path.exists(os.path.expanduser(what)):
        return os.path.abspath(os.path.expanduser(what))
    return f"{HUB}{what}" if isinstance(what, str) and hub.is_repo_id(what) else str(what)


def is_beyond_doubt(what, name: str = registry.DEFAULT) -> bool:
    """Whether a checkpoint is a released tag or hf-hub:org/name, and so no path, wherever it is read."""
    return isinstance(what, str) and (what.startswith(HUB) or _release(what, name) is not None)


def _release(text: str, name: str) -> str | None:
    full = f"{name.partition('.')[0]}.{text}"
    return next((tag for tag in (text, full) if tag in registry.releases()), None)


def split(what: str, name: str = registry.DEFAULT) -> tuple[str, str | None]:
    """A command's NAME|PATH|ORG/NAME -> (model name, checkpoint or None for the default release)."""
    architecture = what.partition(".")[0]
    if architecture in registry.ARCHITECTURES:
        return architecture, None if what == architecture else what
    return name, what


def locate(name: str, cfg, cache_dir=None) -> Path:
    """The local, whole safetensors file of a timm PretrainedCfg: packaged, else local, else from the Hub.

    A file that we released is checked against its SHA-256. Raises CheckpointError.
    """
    if cfg.source == "local-dir":
        return Path(cfg.file) / WEIGHTS_NAME
    full = f"{cfg.architecture or name}.{cfg.tag}" if cfg.tag else name
    entry = registry.releases().get(full)
    packaged = registry.WEIGHTS / entry["file"] if entry and entry.get("file") else None
    if cfg.file and not (Path(cfg.file) == packaged and not packaged.exists() and cfg.hf_hub_id):
        path = Path(cfg.file)
        released = path == packaged
        if entry and released and not path.exists():
            raise CheckpointError(f"{path}: the weights of {full} are missing. {_remedy(entry)}")
    elif cfg.hf_hub_id:
        repo, _, revision = cfg.hf_hub_id.partition("@")
        path = hub.fetch(repo, cfg.hf_hub_filename or WEIGHTS_NAME, revision or None, cache_dir)
        released = cfg.hf_hub_id == (entry or {}).get("hub_id")
    elif cfg.url:
        raise CheckpointError(
            f"{cfg.url}: weights are not loaded from a URL. Download the .safetensors file and "
            "pass its path as checkpoint"
        )
    else:
        raise CheckpointError(_unreleased(name))
    if entry and released:
        check_sha256(path, entry["sha256"])
    return path


def _remedy(entry: dict) -> str:
    if entry.get("wheel", True):
        return "Install uscl-hub again"
    return (
        "They are in the repository, but not in the wheel: install uscl-hub from a checkout (pip install -e CHECKOUT), "
        f"or pass its uscl_hub/weights/{entry['file']} as checkpoint"
    )


def _unreleased(name: str) -> str:
    others = ", ".join(n for n in registry.releases() if n.partition(".")[0] != name)
    return (
        f"{name}: no pretrained weights have been released for it yet. "
        + (f"Released: {others}. " if others else "")
        + "Train some (python training/run.py) and load the exported folder with load_meta_uscl_backbone("
        "checkpoint=FOLDER), or pass pretrained=False for random weights"
    )
