"""Distillation in a training: who teaches, which crops, and their targets ahead of the student.

Crops come in rounds: the teachers look at a round's crops once, the student passes over them `distil.passes` times.
A round follows from the seed, its number and the process, so that a resumed training, too, sees the same crops; another
number of processes sees others.
"""

import contextlib
from typing import NamedTuple

import numpy as np
import torch

from training import distributed
from training.data import batches, pictures
from training.engine import sources
from training.method import crops
from training.method.augment import normalise
from training.method.distillation import Distiller, Teachers
from training.method.networks import input_channels
from training.method.step import Step
from uscl_hub.errors import UserError

FIT = 4096  # crops that the projection of the targets is fitted on
CHUNK = 256  # crops that are made at once
CPU_BATCH = 32  # of them, so many pass the teachers at once on a CPU: its caches hold no more
CELLS = 4  # places a side of the feature maps that are targets
ROUNDS, PASSES, FITTING, VALIDATION = range(4)  # random streams
ON_DEVICE = 8 << 30  # bytes of frames that are kept on a GPU


class Crops(NamedTuple):
    """student: float32 (B, C, s, s), normalised. targets: (B, P); maps: (B, P, h, w) or None."""

    student: torch.Tensor
    targets: torch.Tensor
    maps: torch.Tensor | None
    clips: tuple = ()  # as a batch of pairs has it; crops come from frames of all training clips
    faults: None = None  # likewise


class Distillation:
    """The teachers, the student's head, and the crops of every step."""

    def __init__(self, config, clips, encoder, device):
        self.config, self.clips, self.device = config, clips, device
        self.crops = config.distil.batch or config.optim.batch  # of all ranks
        self.batch = self.crops // distributed.world()
        self.round = max(1, (config.distil.round or self.crops) // self.crops) * self.batch
        self.channels = input_channels(encoder)
        found = [sources.load(spec) for spec in config.distil.teachers]
        self.parents = [source.about for source in found]
        teachers = Teachers([(s.model, s.mean, s.std) for s in found])
        self.teachers = teachers.to(device, memory_format=torch.channels_last)
        clips.cache.check(np.concatenate([clips.train, clips.val]))
        self.frames = None
        if device.type == "cuda" and len(clips.cache.shards) == 1 and clips.cache.frames.nbytes < ON_DEVICE:
            self.frames = torch.tensor(clips.cache.frames, device=device)
        self.tiles = self._tiles()
        self.rows, self.shares = self._rows(clips.train)
        self.val_rows, self.val_shares = self._rows(clips.val)
        blank = torch.zeros(1, 1, config.distil.size, config.distil.size, device=device)
        width = self.teachers(blank, CELLS)[0].shape[1]
        self.distiller = Distiller(encoder.num_features, width, config.distil.components).to(device)
        self.optimizer = torch.optim.AdamW(self.distiller.head.parameters(), lr=config.distil.lr)
        self.ahead = None  # the crops of the next steps, while a contrast is trained
        self.kept = None, None  # number and crops of the last round

    def fit(self):
        """Fit the projection of the targets on the first crops: for a new training, not for a resumed one."""
        pooled = [self._teach(*self._draw((FITTING, i), CHUNK))[1] for i in range(FIT // CHUNK)]
        self.distiller.fit(torch.cat(pooled))

    def load(self, step):
        """The crops of a step, for a training that has no other loss."""
        return self._of_step(step)

    def step(self, state, loaded):
        """One step of the method 'distil'."""
        loss = self._loss(state.encoder.backbone, loaded)
        state.optimizer.zero_grad()
        loss.backward()
        trained = [p for group in state.optimizer.param_groups for p in group["params"]]
        grads = distributed.sum_([p.grad for p in trained])
        torch._foreach_div_(grads, distributed.world())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        state.optimizer.step()
        return Step(loss.detach(), None)

    def gradients(self, encoder, step):
        """Gradient of distil.weight x the loss for every parameter of the encoder (a list); the head takes a step."""
        if self.ahead is None:
            self.ahead = batches.prefetch(self._of_step, range(step, 1 << 62), depth=1)
        loss = self._loss(encoder.backbone, next(self.ahead))
        parameters, head = list(encoder.parameters()), list(self.distiller.head.parameters())
        grads = torch.autograd.grad(self.config.distil.weight * loss, parameters + head, materialize_grads=True)
        grads = distributed.sum_(list(grads))
        torch._foreach_div_(grads, distributed.world())
        for p, g in zip(head, grads[len(parameters) :]):
            p.grad = g
        self.optimizer.step()
        return grads[: len(parameters)]

    @torch.no_grad()
    def validate(self, backbone):
        """Unexplained share of the targets' variance, on crops of the validation clips; always the same crops."""
        losses = []
        for i in range(4):
            student, pooled, maps = self._teach(*self._draw((VALIDATION, i), CHUNK, self.val_rows, self.val_shares))
            with self._autocast():
                losses.append(self.distiller(backbone, student, self.distiller.targets(pooled, None)[0]).item())
        return float(np.mean(losses))

    def close(self):
        """End the thread that makes crops."""
        if self.ahead is not None:
            self.ahead.close()

    def _loss(self, backbone, loaded):
        with self._autocast():
            return self.distiller(backbone, loaded.student, loaded.targets, loaded.maps, self.config.distil.dense)

    def _autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def _of_step(self, step):
        """Crops of one step: a part of a round, in the order of the pass."""
        steps = self.round // self.batch
        number, i = divmod(step, steps * self.config.distil.passes)
        turn, i = divmod(i, steps)
        whole = self._round(number)
        if steps == 1:
            return whole
        order = np.random.default_rng((self.config.seed, batches.DISTIL, PASSES, number, turn)).permutation(self.round)
        index = torch.from_numpy(order[i * self.batch : (i + 1) * self.batch]).to(self.device)
        return Crops(whole.student[index], whole.targets[index], None if whole.maps is None else whole.maps[index])

    def _round(self, number):
        """The crops of a round; the last one is kept, since its steps follow each other."""
        if self.kept[0] != number:
            parts = []
            for i in range(0, self.round, CHUNK):
                size = min(CHUNK, self.round - i)
                student, pooled, maps = self._teach(*self._draw((ROUNDS, number, i, distributed.rank()), size))
                parts.append((student, *self.distiller.targets(pooled, maps if self.config.distil.dense else None)))
            student, targets, maps = zip(*parts)
            maps = torch.cat(maps) if maps[0] is not None else None
            self.kept = number, Crops(torch.cat(student), torch.cat(targets), maps)
        return self.kept[1]

    @torch.no_grad()
    def _teach(self, frames, parameters):
        """uint8 frames (B, S, S) -> the student's crops, the teachers' features and maps of the same crops."""
        seen = crops.make(frames, parameters, self.config.distil.size)
        gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if gpu else contextlib.nullcontext():
            pooled, maps = zip(*(self.teachers(part, CELLS) for part in seen.split(CHUNK if gpu else CPU_BATCH)))
        student = normalise(crops.smaller(seen, self.config.model.size)).expand(-1, self.channels, -1, -1)
        student = student.contiguous(memory_format=torch.channels_last)
        return student, torch.cat(pooled), None if maps[0] is None else torch.cat(maps)

    def _draw(self, key, count, rows=None, shares=None):
        """Frames (on the device) and parameters of `count` crops."""
        rng = np.random.default_rng((self.config.seed, batches.DISTIL, *key))
        rows, shares = (self.rows, self.shares) if rows is None else (rows, shares)
        of = rng.choice(len(rows), count, p=shares)
        chosen = np.array([rows[s][rng.integers(len(rows[s]))] for s in of])
        distil = self.config.distil
        parameters = torch.from_numpy(crops.draw(count, rng, distil.scale, distil.mixup)).to(self.device)
        if self.frames is None:
            frames = torch.from_numpy(self.clips.cache.at(chosen)).to(self.device)
        else:
            frames = self.frames[torch.from_numpy(chosen).to(self.device)]
        if self.tiles is not None and rows is self.rows:
            natural = np.flatnonzero(rng.random(count) < distil.pictures)
            tiles = self.tiles[torch.from_numpy(rng.integers(len(self.tiles), size=len(natural))).to(self.device)]
            frames[torch.from_numpy(natural).to(self.device)] = tiles
        return frames, parameters

    def _tiles(self):
        if not self.config.distil.pictures:
            return None
        try:
            found = pictures.tiles(pictures.packaged(), self.clips.cache.size)
        except ImportError as error:
            raise UserError(str(error)) from None
        self.parents.append({"name": "natural pictures", "licence": pictures.LICENCE, "data": pictures.DATA})
        return torch.from_numpy(found).to(self.device)

    def _rows(self, chosen):
        """The cache's rows of each source's clips, and each source's share of the crops (data.balance)."""
        cache, rows = self.clips.cache, []
        numbers = cache.source_numbers[chosen]
        for source in np.unique(numbers):
            of_source = chosen[numbers == source]
            rows.append(np.concatenate([cache.offsets[i] + np.arange(cache.lengths[i]) for i in of_source]))
        shares = np.array([len(r) for r in rows], float) ** (1 - self.config.data.balance)
        return rows, shares / shares.sum()
