"""One command run by several processes, which torchrun has started: who does which share, and when all have done it."""

import contextlib
import datetime
import os
from typing import Callable, Iterator, TypeVar

import torch.distributed as dist

from uscl_hub.clips import memory
from uscl_hub.errors import UserError

T = TypeVar("T")


def rank() -> int:
    """This process's number; 0 without torchrun."""
    return int(os.environ.get("RANK", 0)) if world() > 1 else 0


def world() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """The processes can talk to each other, and share the memory budget of their machine."""
    if world() == 1 or dist.is_initialized():
        yield
        return
    memory.divide(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with _named():
        # one may need days longer than another
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    try:
        yield
    finally:
        dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """What make() gives in the first process, on all of them; anything that can be pickled."""
    if world() == 1:
        return make()
    values: list = [make() if rank() == 0 else None]
    with _named():
        dist.broadcast_object_list(values)
    return values[0]


def from_all(value) -> list:
    """The values of all processes, in the order of their numbers, on all."""
    if world() == 1:
        return [value]
    values: list = [None] * world()
    with _named():
        dist.all_gather_object(values, value)
    return values


def device(name: str) -> str:
    """'cuda' is, for several processes on a machine, each one's own GPU."""
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" and world() > 1 else name


@contextlib.contextmanager
def _named():
    try:
        yield
    except RuntimeError as error:  # gloo's: the connection to another process is gone
        why = "another process of this command has ended"
        raise UserError(f"{why}; what was finished is kept: start all of them again to go on") from error
