"""The few collective operations of the training step. Without `torchrun` each is the identity."""

import contextlib
import ctypes
import datetime
import os
import sys

import torch
import torch.distributed as dist


def setup(device="auto"):
    """Join the process group that `torchrun` describes, if any. Returns this process's device.

    Raises:
        SystemExit: the device is unknown or not there.
    """
    local = int(os.environ.get("LOCAL_RANK", 0))
    if device not in ("auto", "cpu", "cuda"):
        sys.exit(f"device: 'auto', 'cpu' or 'cuda', not {device!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            sys.exit(f"device: this process needs GPU number {local}, torch finds {torch.cuda.device_count()} of them")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        # The others wait while rank 0 decodes the clips; torchrun ends them if it dies.
        patience = datetime.timedelta(days=2)
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=patience)
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


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


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
