"""Pairs made wrong on purpose, to measure what weighting and searching for them is worth (`pairs.corrupt`).

A share of the training clips is faulty, each with one kind of fault for the whole training. Whenever such a clip gives
a pair, its second view is, with the probability `pairs.corrupt_often`, not what it should be:

    clip     a frame of another clip of the same source
    cut      a frame of a clip of another source: another scanner, another organ
    black    no image, as from a probe off the skin
    frozen   the first view once more
    noise    noise
"""

from dataclasses import dataclass

import numpy as np

from training.config import Pairs

KINDS = ("clip", "cut", "black", "frozen", "noise")
STREAM = 6  # of random numbers, beside those of `batches`


@dataclass(frozen=True)
class Faults:
    """The faulty clips of a training.

    kinds: by clip (index into the cache), one of KINDS; others, foreign: by faulty clip, the clips of the same source
    and of other ones, whose frames may take the place of its own; often: the probability that a pair of a faulty clip
    is wrong.
    """

    kinds: dict[int, str]
    others: dict[int, np.ndarray]
    foreign: dict[int, np.ndarray]
    often: float

    def spoil(self, cache, clips, key, part, batch):
        """Make the pairs of faulty clips wrong, in place.

        Args:
            cache: `cache.FrameCache`; clips: indices of the global batch's clips.
            key: ints that fix every random number; those of pair i do not depend on other pairs.
            part: the slice of the batch that this rank has.
            batch: frames uint8 (n, K, S, S) and mix float32 (n, 2, K) of that slice.

        Returns:
            Of every pair of the global batch its fault, '' where it is right.
        """
        frames, mix = batch
        first = range(len(clips))[part].start
        done = []
        for i, clip in enumerate(clips):
            kind, rng = self.kinds.get(int(clip), ""), np.random.default_rng((*key, STREAM, i))
            if not kind or rng.random() >= self.often:
                done.append("")
                continue
            done.append(kind)
            if 0 <= (row := i - first) < len(frames):
                if kind == "frozen":
                    mix[row, 1] = mix[row, 0]
                else:
                    partner_alone(mix[row])
                    frames[row, -1] = self.partner(cache, int(clip), kind, rng)
        return done

    def partner(self, cache, clip, kind, rng):
        """What stands in the place of a frame of the clip: uint8 (S, S)."""
        shape = (cache.size, cache.size)
        if kind == "black":
            return np.zeros(shape, np.uint8)
        if kind == "noise":
            return rng.integers(0, 256, shape, dtype=np.uint8)
        other = int(rng.choice((self.others if kind == "clip" else self.foreign)[clip]))
        return cache.take(np.array([other]), rng.integers(cache.lengths[other], size=1))[0]


def partner_alone(mix):
    """Convex weights (2, K) of which the last frame is the whole second view and no part of the first."""
    mix[0, -1] = 0
    mix[0] = mix[0] / mix[0].sum()
    mix[1] = 0
    mix[1, -1] = 1


def plant(cache, train, pairs: Pairs, seed):
    """Choose the faulty clips: of the training clips the share pairs.corrupt, the kinds in turn.

    Args:
        cache: `cache.FrameCache`; train: int (n,), indices of the training clips.
        pairs, seed: the training's.

    Returns:
        `Faults`, or None where pairs.corrupt is 0. Without a second source there is no 'cut'.
    """
    if not pairs.corrupt:
        return None
    sources = cache.source_numbers[train]
    kinds = [kind for kind in KINDS if kind != "cut" or len(set(sources)) > 1]
    order = np.random.default_rng((seed, STREAM)).permutation(len(train))[: round(pairs.corrupt * len(train))]
    faulty = {int(train[i]): kinds[n % len(kinds)] for n, i in enumerate(order)}
    rows = {int(train[i]): i for i in order}
    others, foreign = {}, {}
    for clip, kind in faulty.items():
        same = sources == sources[rows[clip]]
        if kind == "cut":
            foreign[clip] = train[~same]
        elif kind == "clip":
            alike = train[same & (train != clip)]
            others[clip] = alike if len(alike) else train[train != clip]
    return Faults(faulty, others, foreign, pairs.corrupt_often)
