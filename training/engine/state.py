"""Checkpoints: what they hold, how they are written, and what a resumed run must share with them."""

import hashlib
import json
import math
import operator
import zipfile

import torch

from training import distributed
from training.config import Config
from training.messages import one_line, say
from uscl_hub import files
from uscl_hub.errors import UserError


class State:
    """What a checkpoint holds: networks, optimizers, the number of steps done and the settings that must not change.

    distiller, distiller_optimizer: the head of a distillation and, beside a contrast, its optimizer.
    parents: provenance of the weights that the training starts from and of its teachers (not in a checkpoint).
    """

    def __init__(self, encoder, cmw, optimizer, cmw_optimizer, fixed):
        self.encoder, self.cmw, self.optimizer, self.cmw_optimizer = encoder, cmw, optimizer, cmw_optimizer
        self.distiller = self.distiller_optimizer = None
        self.step, self.fixed, self.parents = 0, fixed, []
        self.saved = None  # the step of the checkpoint file

    def parts(self):
        return {k: v for k, v in vars(self).items() if hasattr(v, "state_dict")}


def fixed(config, clips):
    """The settings that a resumed run must share with the run that it continues, and a hash of clips and splits."""
    digest = _data_digest(clips) if distributed.rank() == 0 else None
    return _settings(config) | {"data (clips, splits, frames)": distributed.broadcast(digest)}


def _data_digest(clips):
    """Of json.dumps([name of the cache's settings, manifest]), a line at a time."""
    digest = hashlib.sha256(f"[{json.dumps(clips.cache.path.name)}, [".encode())
    for i, line in enumerate(clips.manifest()):
        digest.update((", " * (i > 0) + json.dumps(line)).encode())
    digest.update(b"]]")
    return digest.hexdigest()[:16]


def _settings(config):
    values = {"method": config.method, "seed": config.seed, "precision": config.precision}
    values |= {"data.balance": config.data.balance}
    for group in ("pairs", "model", "meta", "loss", "distil", "optim"):
        values.update({f"{group}.{k}": v for k, v in vars(getattr(config, group)).items()})
    return values


class Diverged(UserError):
    """The training has left the finite numbers; the message says which one, `ended` what to do."""

    def ended(self, state):
        kept = "no checkpoint was written" if state.saved is None else f"the checkpoint of step {state.saved} is kept"
        return UserError(f"step {state.step}: {self}; lower optim.lr or raise optim.warmup_epochs ({kept})")


def check_finite(state):
    """Raise Diverged unless weights, running statistics and the optimizers' memories are all finite."""

    def bad(value, name):
        if isinstance(value, dict):
            return next((found for key, v in value.items() if (found := bad(v, f"{name}.{key}"))), None)
        if isinstance(value, (list, tuple)):
            return next((found for i, v in enumerate(value) if (found := bad(v, f"{name}.{i}"))), None)
        if isinstance(value, torch.Tensor):
            return None if bool(torch.isfinite(value).all()) else name
        return None if not isinstance(value, float) or math.isfinite(value) else name

    if name := next((found for k, part in state.parts().items() if (found := bad(part.state_dict(), k))), None):
        raise Diverged(f"{name} is not finite any more")


def checkpoint_bytes(state):
    """About the size of the checkpoint file: weights and, for each, what its optimizer remembers."""
    sgd = isinstance(state.optimizer, torch.optim.SGD)  # remembers a momentum; Adam two averages
    sizes = {"encoder": 2 if sgd else 3, "cmw": 3, "distiller": 3}
    parts = ((getattr(state, name), times) for name, times in sizes.items())
    return sum(times * p.nbytes for part, times in parts if part is not None for p in part.parameters())


def find_checkpoint(config, out):
    path = out / "checkpoint.pt"
    if config.resume and not path.exists():
        say(f"{path} does not exist yet: starting from the beginning")
    elif path.exists() and not config.resume:
        raise UserError(f"{out} holds a training already: --resume goes on with it, another --out starts a new one")
    return path if config.resume and path.exists() else None


def save(state, path):
    """Write the checkpoint, whole or not at all: a crash or a full disk leaves the old one.

    Raises Diverged, before anything is written, if a number of it is not finite.
    """
    check_finite(state)
    content = {name: part.state_dict() for name, part in state.parts().items()}
    content |= {"step": state.step, "fixed": state.fixed}

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(content, file)

    try:
        files.write_whole(path, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        raise UserError(f"{path}: cannot write the checkpoint ({one_line(error)}); the previous one, if any, is intact")
    state.saved = state.step


ADAM = {"step", "exp_avg", "exp_avg_sq"}
MEMORIES = {"SGD": {"momentum_buffer"}, "Adam": ADAM, "AdamW": ADAM}  # nothing before the first step


def _options(optimizer):
    """All that is set of an optimizer but the learning rate, which the schedule sets."""
    kept = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]
    return [(group, len(own["params"])) for group, own in zip(kept, optimizer.param_groups)]


def _check_optimizer(name, optimizer, options):
    """Raise ValueError unless a restored optimizer has these options, a learning rate, and of each weight all that it
    remembers, in the weight's shape: torch would notice at the next step only, or never."""
    if _options(optimizer) != options:
        raise ValueError(f"{name} has other options")
    if any(type(group["lr"]) not in (int, float) or not 0 <= group["lr"] < 1e6 for group in optimizer.param_groups):
        raise ValueError(f"{name} has no learning rate")
    for weight, memory in optimizer.state.items():
        if memory and set(memory) != MEMORIES[type(optimizer).__name__]:
            raise ValueError(f"{name} remembers {', '.join(map(str, memory))}")
        for key, value in memory.items():
            counts = key == "step" and isinstance(value, torch.Tensor) and value.ndim == 0 and value >= 0
            if not counts and getattr(value, "shape", None) != weight.shape:
                raise ValueError(f"{name}.{key} does not have the shape of its weight")


def damaged(path, error):
    return UserError(f"{path}: damaged or not a checkpoint of ours ({type(error).__name__}: {one_line(error)})")


def restore(state, path):
    """Load a checkpoint of the same settings. The random numbers need no restoring: they follow from the step."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if changed := archive.testzip():
                raise zipfile.BadZipFile(f"{changed} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        there = _settings(Config()) | dict(content["fixed"])  # a setting that it does not know has its default
    except Exception as error:  # whatever a damaged file makes torch raise
        raise damaged(path, error) from error
    differ = [f"{k}: {there.get(k)!r} there, {v!r} here" for k, v in state.fixed.items() if there.get(k) != v]
    if differ:
        raise UserError(f"{path}: --resume needs the settings it was started with; " + "; ".join(differ))
    try:
        for name, part in state.parts().items():
            optimizer = isinstance(part, torch.optim.Optimizer)
            options = _options(part) if optimizer else None
            part.load_state_dict(content[name])
            if optimizer:
                _check_optimizer(name, part, options)
        state.step = state.saved = operator.index(content["step"])
        if state.step < 0:
            raise ValueError(f"step {state.step}")
        check_finite(state)
    except Diverged as error:
        raise UserError(f"{path}: {error}: start again in another folder") from None
    except Exception as error:  # whatever a state of other shapes and types makes torch raise
        raise damaged(path, error) from error
    say(f"resumed at step {state.step}")
