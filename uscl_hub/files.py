"""Files that appear whole or not at all, and folders that one process at a time writes to."""

import os
from contextlib import contextmanager
from pathlib import Path


class InUse(OSError):
    """Another process is writing to the folder."""


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
