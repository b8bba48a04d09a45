"""The Hugging Face Hub, through huggingface_hub alone, so that its cache, HF_HUB_OFFLINE, HF_ENDPOINT
and tokens apply."""

import os
import re
from pathlib import Path

from uscl_hub.checkpoints import CARD_NAME, CONFIG_NAME, WEIGHTS_NAME
from uscl_hub.errors import CheckpointError
from uscl_hub.files import check_regular
from uscl_hub.tensors import check_sha256, one_line


def is_repo_id(text: str) -> bool:
    """Whether text has the form org/name.

    >>> is_repo_id("org/name"), is_repo_id("runs/demo/export")
    (True, False)
    """
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text) is not None and ".." not in text


def fetch(repo: str, filename: str, revision: str | None = None, cache_dir=None) -> Path:
    """Path of one file of a model repository, downloaded unless the cache has it.

    Large files carry their SHA-256 as the cache's name for them; it is checked. Raises CheckpointError.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import HFValidationError

    what = f"{repo}{f'@{revision}' if revision else ''}/{filename}"
    _check_token(what)
    try:
        path = Path(hf_hub_download(repo, filename, revision=revision, cache_dir=cache_dir, library_name="uscl-hub"))
    except HFValidationError as error:
        raise CheckpointError(f"{what}: not a Hub id of the form org/name ({error})") from error
    except (*_transport_errors(), ValueError) as error:
        raise CheckpointError(f"{what}: {_explain(error)}") from error
    blob = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", blob.name):
        check_sha256(blob, blob.name)
    return path


def fetch_folder(repo: str, revision: str | None = None, cache_dir=None) -> Path:
    """The folder in the cache that holds config.json and model.safetensors of one commit of a repository."""
    folder = fetch(repo, CONFIG_NAME, revision, cache_dir).parent
    # the snapshot's folder is the commit: both files then are of the same one, whatever happens in between
    commit = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else revision
    fetch(repo, WEIGHTS_NAME, commit, cache_dir)
    return folder


def push(folder, repo: str, *, private: bool = False, revision: str | None = None) -> str:
    """Check an exported folder, upload its three files in one commit, and return the commit's URL.

    Creates the repository if it does not exist. Raises CheckpointError.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    from uscl_hub.classifier import check_export

    folder = Path(folder)
    if not is_repo_id(repo):
        raise CheckpointError(f"{repo}: not a Hub id of the form org/name")
    for name in (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME):
        _check_own(folder, name)
    check_export(folder)
    _check_token(repo)
    files = [CommitOperationAdd(name, str(folder / name)) for name in (WEIGHTS_NAME, CONFIG_NAME, CARD_NAME)]
    api = HfApi(library_name="uscl-hub")
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        return api.create_commit(repo, files, commit_message="Upload with uscl-hub", revision=revision).commit_url
    except _transport_errors() as error:
        raise CheckpointError(f"{repo}: {_explain(error)}") from error
    except ValueError as error:  # the Hub's own check of the card's YAML header
        raise CheckpointError(f"{folder / CARD_NAME}: {error}") from error


def _check_own(folder: Path, name: str) -> None:
    """Raise CheckpointError unless the name is that of a regular file which lies in the folder itself."""
    path = folder / name
    try:
        check_regular(path)
    except FileNotFoundError:
        why = "A checkpoint is not shared without its model card" if name == CARD_NAME else "It belongs to an export"
        raise CheckpointError(f"{path}: no such file. {why}") from None
    except OSError as error:
        raise CheckpointError(str(error)) from None
    if path.resolve().parent != folder.resolve():
        raise CheckpointError(f"{path}: is a link that leads out of the folder. Put the file itself there to share it")


def _check_token(what: str) -> None:
    """Raise CheckpointError if the token cannot be sent: the HTTP library would speak of a codec."""
    from huggingface_hub import constants, get_token

    again = "Set HF_TOKEN again, or log in again with `hf auth login`"
    try:
        if not os.environ.get("HF_TOKEN") and os.path.exists(constants.HF_TOKEN_PATH):
            check_regular(constants.HF_TOKEN_PATH)
        token = get_token() or ""
    except (OSError, ValueError) as error:  # ValueError: it is no UTF-8
        raise CheckpointError(
            f"{what}: the Hub's token in {constants.HF_TOKEN_PATH} cannot be read ({one_line(error)}). {again}"
        ) from error
    if odd := [c for c in token if not "!" <= c <= "~"]:
        raise CheckpointError(f"{what}: the Hub's token holds the character {odd[0]!a}, which no token has. {again}")


def _transport_errors() -> tuple:
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    # The HTTP library under huggingface_hub differs by version: take its base error from where it is
    # inherited. The Xet transfer library raises plain RuntimeErrors.
    return OSError, EntryNotFoundError, HfHubHTTPError, HfHubHTTPError.__mro__[1], RuntimeError


def _explain(error) -> str:
    from huggingface_hub import constants, errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return "is gated. Ask for access on its Hub page, then log in with `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return (
            "no such repository on the Hub, or it is private. Check the name; if it is right, log in with "
            "`hf auth login` (or set HF_TOKEN) as someone who may use it"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision. Use an existing branch, tag or full commit hash"
    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            return "not in the local cache, and HF_HUB_OFFLINE is set. Unset it, or download once while online"
        return f"could not be reached and is not in the local cache. Check the network and {constants.ENDPOINT}"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file. It is not an export of ours: check the name and revision"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set. Unset it to use the Hub"
    if isinstance(error, ValueError) or not re.match("https?://[^/]", constants.ENDPOINT):
        why = one_line(error)
        return f"cannot be asked for at {constants.ENDPOINT!r} ({why}). Check HF_ENDPOINT and the proxy's settings"
    return f"the transfer failed ({type(error).__name__}: {one_line(error)}). Try again"
