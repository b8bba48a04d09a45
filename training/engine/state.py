"""Checkpoints: what they hold, how they are written, and what a resumed run must share with them."""

import hashlib
import json
import sys
import zipfile

import torch

from training.messages import one_line, say
from uscl_hub import files


class State:
    """What a checkpoint holds: networks, optimisers, the number of steps done and the settings that must not change."""

    def __init__(self, encoder, cmw, optimizer, cmw_optimizer, fixed):
        self.encoder, self.cmw, self.optimizer, self.cmw_optimizer = encoder, cmw, optimizer, cmw_optimizer
        self.step, self.fixed = 0, fixed

    def parts(self):
        return {k: v for k, v in vars(self).items() if hasattr(v, "state_dict")}


def fixed(config, clips):
    """The settings that a resumed run must share with the run that it continues, and a hash of clips and splits."""
    values = {"method": config.method, "seed": config.seed, "precision": config.precision}
    for group in ("pairs", "model", "meta", "optim"):
        values.update({f"{group}.{k}": v for k, v in vars(getattr(config, group)).items()})
    cached = [clips.cache.path.name, clips.manifest()]
    return values | {"data (clips, splits, frames)": hashlib.sha256(json.dumps(cached).encode()).hexdigest()[:16]}


def find_checkpoint(config, out):
    path = out / "checkpoint.pt"
    if config.resume and not path.exists():
        say(f"{path} does not exist yet: starting from the beginning")
    elif path.exists() and not config.resume:
        sys.exit(f"{out} holds a training already: --resume True goes on with it, another --out starts a new one")
    return path if config.resume and path.exists() else None


def save(state, path):
    """Write the checkpoint, whole or not at all: a crash or a full disk leaves the old one."""
    content = {name: part.state_dict() for name, part in state.parts().items()}
    content |= {"step": state.step, "fixed": state.fixed}

    def write(temporary):
        with open(temporary, "wb") as file:
            torch.save(content, file)

    try:
        files.write_whole(path, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        sys.exit(f"{path}: cannot write the checkpoint ({one_line(error)}); the previous one, if any, is intact")


def restore(state, path):
    """Load a checkpoint of the same settings. The random numbers need no restoring: they follow from the step."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if changed := archive.testzip():
                raise zipfile.BadZipFile(f"{changed} does not match its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True)
        there = content["fixed"]
    except Exception as error:  # whatever a damaged file makes torch raise
        sys.exit(f"{path}: damaged or not a checkpoint of ours ({type(error).__name__}: {one_line(error)})")
    differ = [f"{k}: {there.get(k)!r} there, {v!r} here" for k, v in state.fixed.items() if there.get(k) != v]
    if differ:
        sys.exit(f"{path}: --resume needs the settings it was started with; " + "; ".join(differ))
    for name, part in state.parts().items():
        part.load_state_dict(content[name])
    state.step = content["step"]
    say(f"resumed at step {state.step}")
