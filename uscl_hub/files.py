"""Files that appear whole or not at all, and folders that one process at a time writes to."""

import errno
import hashlib
import json
import os
import shutil
import stat
import unicodedata
import uuid
from contextlib import contextmanager, suppress
from pathlib import Path

from uscl_hub.errors import UserError

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class InUse(OSError):
    """Another process is writing to the folder."""


class NotAFile(UserError, OSError):
    """What should be read is a pipe, a device, a socket or a folder: opening it could wait or go on for ever."""


def existing(path) -> Path | None:
    """The path as it is written on the disk, each of its names in that or the other Unicode normal form; None if there
    is no such path."""
    path = Path(path)
    with suppress(OSError, ValueError):  # a name that is too long, or holds a zero byte
        if path.exists():
            return path
        found = Path(path.anchor)
        for name in path.parts[len(found.parts) :]:
            spellings = (found / unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
            found = next((spelled for spelled in (found / name, *spellings) if spelled.exists()), found / name)
        return found if found.exists() else None
    return None


def check_regular(path, name=None) -> os.stat_result:
    """The status of a path (links followed) or of an open file's number, which errors then call `name`.

    Raises NotAFile unless it is a regular file, OSError if it cannot be looked at.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise NotAFile(f"{path if name is None else name}: is {kind}, not a regular file. Give the path of a file")
    return status


def open_regular(path):
    """open(path, 'rb'), but NotAFile is raised at once where it is no regular file."""
    check_regular(path)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    try:
        check_regular(file.fileno(), path)  # it may have been replaced since
    except BaseException:
        file.close()
        raise
    return file


def sha256(path) -> str:
    """Hex SHA-256 of a regular file's content. Raises NotAFile or OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def temporary(path: Path) -> Path:
    """A new hidden name beside `path`, with its suffix: no other process, on any host, has the same one."""
    return path.with_name(f".{path.stem[:40]}.{uuid.uuid4().hex}.tmp{path.suffix[:20]}")


def finished(folder, suffix: str) -> list[Path]:
    """The files of a folder with a suffix, sorted, without the temporary ones that a killed process left."""
    files = Path(folder).glob(f"*{suffix}")
    return sorted(path for path in files if not (path.name.startswith(".") and path.stem.endswith(".tmp")))


def write_whole(path, write) -> None:
    """Call write(temporary path), then give that file the name `path`; parent folders are made.

    Whatever happens on the way, `path` holds the new content or what it held before, never half of one. A link is
    followed: the file that it names is replaced, with its permissions. The temporary path has the suffix of `path`.
    Raises NotAFile if `path` is a device, a pipe or a folder, OSError with the name of `path` if it cannot be written.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.exists():
        check_regular(target, path)
    part = temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could keep the new name and lose the content
        if target.exists():
            with suppress(OSError):
                shutil.copymode(target, part)
        os.replace(part, target)
    except OSError as error:
        full = error.filename is None and error.errno in FULL  # a write does not know the name of its file
        if error.errno is None or not (full or part.name in str(error.filename)):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error  # the name that the user knows
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    """`write_whole` of a text, in UTF-8. What UTF-8 cannot hold (a file name's stray bytes) is written as \\udcff."""
    content = text.encode("utf-8", "backslashreplace")
    write_whole(path, lambda part: part.write_bytes(content))


def write_json(path, value, indent: int | None = 1) -> None:
    """`write_whole` of a value as JSON, with a final newline."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def check_room(folder, need: int = 4096) -> None:
    """Raise OSError unless a file of `need` bytes can be written in `folder`: it is read-only, or the disk is full."""
    folder = Path(folder)
    probe = temporary(folder / "probe")
    try:
        probe.write_bytes(bytes(4096))
        if shutil.disk_usage(folder).free < need:
            wanted = f"{need / 2**20:.0f} MiB are needed here, {shutil.disk_usage(folder).free / 2**20:.0f} are free"
            raise OSError(errno.ENOSPC, wanted, str(folder))
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(folder)) from None
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


@contextmanager
def locked(folder, seconds: float = 0.0):
    """Hold `folder`'s lock. Raises InUse if another process still has it after so many seconds; a killed process gives
    it up."""
    from filelock import FileLock, Timeout

    lock = FileLock(Path(folder) / ".lock", timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise InUse(f"{folder}: another process is writing here; wait for it, or choose another place") from None
    try:
        yield
    finally:
        lock.release()
