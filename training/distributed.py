"""The few collective operations of the training step. Without `torchrun` each is the identity."""

import contextlib
import ctypes
import datetime
import itertools
import os
import signal
import socket
import sys
import threading
import time

import torch
import torch.distributed as dist

from uscl_hub.clips import memory
from uscl_hub.errors import UserError


def setup(device="auto"):
    """Join the process group that `torchrun` describes, if any. Returns this process's device.

    Raises:
        UserError: the device is unknown or not there.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"device: 'auto', 'cpu' or 'cuda', not {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise UserError(f"device: this process needs GPU number {local}, torch finds {found} of them")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # One may decode its share of the clips for longer than the others; their watch ends them if it dies.
        patience = datetime.timedelta(days=2)
        # what is no tensor travels by gloo, also between GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=patience)
        memory.divide(local_world())
        if world() > 1:
            Watch().start()
    if device == "cpu":
        keep_freed_memory()
    return torch.device(device)


def keep_freed_memory():
    """Have glibc keep what a step frees for the next one, instead of returning it to the system and having every
    page zeroed again. Other C libraries are left alone."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


class Watch(threading.Thread):
    """Ends this process, with a line that says why, when another rank or the launcher has died.

    Every rank counts up its own key of the store at MASTER_ADDR. One whose count stands still for SILENCE seconds is
    dead, unless its last word was that it has finished. Without the watch a collective operation waits for days.
    """

    EVERY, SILENCE, GRACE = 2.0, 20.0, 30.0  # seconds

    def __init__(self):
        super().__init__(daemon=True, name="watch")
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
        self.key = f"uscl/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        self.launcher = os.getppid()
        self.names, self.seen = {}, {}
        self.store.set(f"{self.key}/name/{rank()}", f"rank {rank()} ({socket.gethostname()}, process {os.getpid()})")
        self.store.set(f"{self.key}/alive/{rank()}", "0")
        dist.barrier()

    def run(self):
        for beat in itertools.count(1):
            try:
                if (lost := self.look(beat)) is not None:
                    return self.end(f"{lost} has died; the last checkpoint is intact: go on with --resume")
            except RuntimeError:  # the store is gone, with the process that kept it
                return self.end("the launcher or rank 0 has died; the last checkpoint is intact: go on with --resume")
            time.sleep(self.EVERY)

    def look(self, beat):
        """Tell the others that this rank lives. Returns the name of what has died, None while nothing has."""
        self.store.set(f"{self.key}/alive/{rank()}", "finished" if finished.is_set() else str(beat))
        now = time.monotonic()
        for other in range(world()):
            word = self.store.get(f"{self.key}/alive/{other}")
            if word != self.seen.get(other, (None,))[0] or word == b"finished":
                self.seen[other] = word, now
            elif now - self.seen[other][1] > self.SILENCE:
                return self.store.get(f"{self.key}/name/{other}").decode()
        return "the launcher" if os.getppid() != self.launcher else None

    def end(self, why):
        """A running step may end and save, as after a signal; what cannot is ended after GRACE seconds."""
        if finished.is_set():
            return
        with contextlib.suppress(OSError):
            print(f"rank {rank()}: {why}", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.GRACE)
        os._exit(1)


@contextlib.contextmanager
def losses_named():
    """Where an operation with the other ranks fails, give the watch the time to say which of them has died."""
    try:
        yield
    except RuntimeError:
        if world() > 1:
            time.sleep(Watch.SILENCE + 5 * Watch.EVERY)  # it ends this process if one has
        raise


finished = threading.Event()  # set by a rank that has nothing more to do with the others


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def local_world():
    """The ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if world() > 1 else 1


def share(n):
    """This rank's slice of n things, in the order in which `gather` puts them together again."""
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def barrier():
    if world() > 1:
        dist.barrier()


def broadcast(value):
    """Rank 0's value of any picklable kind, on every rank."""
    if world() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def scatter(values):
    """This rank's one of rank 0's values, a picklable one for each rank; the other ranks give None."""
    if world() == 1:
        return values[0]
    mine = [None]
    dist.scatter_object_list(mine, values)
    return mine[0]


def gather_values(value):
    """The picklable values of all ranks on rank 0, an empty list on the others."""
    if world() == 1:
        return [value]
    values = [None] * world() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


def gather(x, dim=1):
    """Concatenate `x` (same shape on every rank) over the ranks; only this rank's part carries a gradient.

    A loss of the gathered tensor is the global loss on every rank, and the gradients of all ranks add up to its
    gradient: see `sum_`.
    """
    if world() == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world())]
    dist.all_gather(parts, x.detach().contiguous())
    parts[rank()] = x
    return torch.cat(parts, dim=dim)


def sum_(tensors):
    """Sum a list of tensors over the ranks, in place, in one message. Returns the list."""
    if world() > 1 and tensors:  # a network without batch norm has no running statistics
        flat = torch.cat([t.reshape(-1) for t in tensors])
        dist.all_reduce(flat)
        for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            t.copy_(part.view_as(t))
    return tensors


def average_buffers(module):
    """Average the floating-point buffers (running statistics) over the ranks, in place."""
    if world() > 1:
        buffers = [b for b in module.buffers() if b.is_floating_point()]
        for b in sum_(buffers):
            b /= world()


def any_(flag, device):
    """True on every rank if `flag` is true on one."""
    if world() == 1:
        return flag
    flag = torch.tensor(float(flag), device=device)
    dist.all_reduce(flag)
    return bool(flag)
