"""Files that appear whole or not at all, and folders that one process at a time writes to."""

import hashlib
import os
import stat
from contextlib import contextmanager
from pathlib import Path

from uscl_hub.errors import UserError

KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class InUse(OSError):
    """Another process is writing to the folder."""


class NotAFile(UserError, OSError):
    """What should be read is a pipe, a device, a socket or a folder: opening it could wait or go on for ever."""


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


def write_whole(path, write) -> None:
    """Call write(temporary path), then give that file the name `path`; parent folders are made.

    Whatever happens on the way, `path` holds the new content or what it held before, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # or a power cut could keep the new name and lose the content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(folder):
    """Hold `folder`'s lock. Raises InUse at once if another process has it; a killed process gives it up."""
    from filelock import FileLock, Timeout

    lock = FileLock(Path(folder) / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InUse(f"{folder}: another process is writing here; wait for it, or choose another place") from None
    try:
        yield
    finally:
        lock.release()
