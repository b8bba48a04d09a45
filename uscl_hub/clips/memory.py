"""The memory that decoded frames may take in this process.

USCL_HUB_MEMORY is the budget in GiB of a command with all of its workers; without it, half of what the machine (or
the container, or the shell's limit) has.
"""

import math
import os

from uscl_hub.errors import UserError

SETTING = "USCL_HUB_MEMORY"
_share = 1  # processes that divide the budget


def budget() -> int:
    """Bytes for this process. Raises UserError if USCL_HUB_MEMORY is not a number of GiB."""
    return max(2**26, _total() // _share)


def divide(processes: int):
    """This process is one of so many that share the budget."""
    global _share
    _share = max(1, processes)


def _total() -> int:
    if setting := os.environ.get(SETTING):
        try:
            gib = float(setting)
        except ValueError:
            gib = math.nan
        if not 0 < gib < 2**20:
            raise UserError(f"{SETTING}={setting!r}: give a number of GiB, such as 8")
        return int(gib * 2**30)
    return min(_machine(), *_limits()) // 2


def _machine() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return 16 * 2**30


def _limits():
    """Bytes that the shell (ulimit) and the container allow, where they say so."""
    try:
        import resource

        soft = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
        yield from (limit for limit in soft if limit != resource.RLIM_INFINITY)
    except ImportError:
        pass
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(file, encoding="ascii") as text:
                yield int(text.read())
        except (OSError, ValueError):  # no such file, or 'max'
            continue
    yield 2**60
