"""What a training records: progress bar, log.jsonl, TensorBoard."""

import json
import os

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training import distributed
from uscl_hub import files

COLLAPSED = 2.0  # an effective rank below this means that the features have (nearly) become one number


def rounded(x):
    return [round(v, 5) for v in x.tolist()]


class Log:
    """Progress bar, log.jsonl and TensorBoard, on rank 0; elsewhere it does nothing."""

    def __init__(self, out, done, total):
        self.on = distributed.rank() == 0
        if not self.on:
            return
        path = out / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and done else []
        kept = [line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= done]
        files.write_text(path, "".join(kept))  # what came later happens again
        self.file = open(path, "a", encoding="utf-8")
        self.board = SummaryWriter(out / "tensorboard", purge_step=done + 1)
        self.bar = tqdm(total=total, initial=done, unit="step", dynamic_ncols=True)
        self.last = {}

    def step(self, step, loss, result, loaded, numbers):
        """Record a step: its loss, its result (a `step.Step`), the pairs it was made of, and further numbers by name.

        Where pairs are made wrong (pairs.corrupt), the row says which, and every pair's similarity and loss.

        Args:
            numbers: {'lr': ..., 'images_per_s': ..., 'wait_share': share of the time that it waited for `loaded`}.
        """
        meta_loss = {} if result.meta_loss is None else {"meta_loss": result.meta_loss.item()}
        if not self.on:
            return
        row = {"step": step, "loss": loss, **meta_loss, **numbers}
        for k, v in row.items():
            self.board.add_scalar(f"train/{k}", v, step)
        if result.weights is not None:
            row.update(weights=rounded(result.weights), clips=np.asarray(loaded.clips).tolist())
            self.board.add_histogram("weights", result.weights, step)
        if loaded.faults is not None:
            row.update(clips=np.asarray(loaded.clips).tolist(), faults=loaded.faults)
            row.update(similarity=rounded(result.similarity), losses=rounded(result.losses))
        self.file.write(json.dumps(row) + "\n")
        self.last.update(loss=f"{loss:.3f}", lr=f"{numbers['lr']:.3g}")
        self.last.update(img_s=f"{numbers['images_per_s']:.0f}")
        self.bar.set_postfix(self.last, refresh=False)
        self.bar.update()

    def check(self, step, numbers):
        for k, v in numbers.items():
            if v is not None:
                self.board.add_scalar(f"validation/{k}", v, step)
        self.file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.last.update(
            val=f"{numbers['val_loss']:.3f}", knn="-" if numbers["knn"] is None else f"{numbers['knn']:.3f}"
        )
        if numbers["effective_rank"] < COLLAPSED:
            tqdm.write(
                f"step {step}: COLLAPSE? the features' effective rank is {numbers['effective_rank']:.2f}; "
                "lower optim.lr or use more different clips"
            )

    def flush(self):
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self):
        if self.on:
            self.flush()
            self.file.close()
            self.board.close()
            self.bar.close()
