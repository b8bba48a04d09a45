"""Groups that must not be split: those that are given (patients), else clusters of images that are nearly the same."""

from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from uscl_hub.clips import UnreadableClip, iter_frames
from uscl_hub.labels.items import Item, LabelError, Labels
from uscl_hub.preprocess import resize

HANDFUL = 5  # groups a class; with fewer, a test says little
DUPLICATE = 0.94  # correlation of 32 px images; on BUSI few pairs lie between 0.93 and 0.96
BLOCK = 4096  # images compared with all at once: bounds the memory


def near_duplicates(images: list[np.ndarray], threshold: float = DUPLICATE) -> np.ndarray:
    """Cluster of every image, int (N,): the index of the cluster's first image.

    images: uint8 (H, W), any sizes. Two images whose 32 px versions correlate (Pearson) above the threshold are
    linked; clusters are the connected components, so the result does not depend on the order of the pairs.

    >>> ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)
    >>> near_duplicates([ramp, 255 - ramp, ramp + 9]).tolist()
    [0, 1, 0]
    """
    if not images:
        return np.zeros(0, int)
    small = np.stack([resize(image, 32).ravel() for image in images]).astype(np.float64)
    small -= small.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(small, axis=1, keepdims=True)
    small = np.divide(small, norm, out=np.zeros_like(small), where=norm > 0)
    pairs = [np.argwhere(small[i : i + BLOCK] @ small.T > threshold) + (i, 0) for i in range(0, len(small), BLOCK)]
    one, other = np.concatenate(pairs).T
    linked = coo_matrix((np.ones(len(one), bool), (one, other)), shape=(len(small), len(small)))
    _, component = connected_components(linked.tocsr(), directed=False)
    _, first = np.unique(component, return_index=True)
    return first[component]


def few_groups(found: Labels) -> list[str]:
    if found.task != "classification":
        return []
    counts = Counter(label for label, _ in set(zip(found.targets.tolist(), found.groups.tolist())))
    few = [f"{name!r} {counts[i]}" for i, name in enumerate(found.classes) if counts[i] < HANDFUL]
    if not few:
        return []
    return [f"fewer than {HANDFUL} groups (patients) of a class: {', '.join(few)}. Scores on it will say little"]


def cluster(found: Labels) -> Labels:
    """Labels with groups: as they are where groups are given, else clusters of near-duplicate first frames.

    Decodes a frame of every file. Raises LabelError if one cannot be read.
    """
    if found.groups_known or all(item.group for item in found.items):
        return found
    with ThreadPoolExecutor(4) as pool:  # decoders and resizing release the GIL
        first = list(pool.map(_first_frame, found.items))
    if bad := [str(result) for result in first if isinstance(result, UnreadableClip)]:
        raise LabelError(f"{len(bad)} file(s) cannot be read, the first: {bad[0]}. Repair them or leave them out")
    clusters = near_duplicates(first)
    items = tuple(replace(item, group=found.items[c].id) for item, c in zip(found.items, clusters))
    found = replace(found, items=items)
    note = (
        f"patients are unknown (there is no column 'group'): {len(items)} files are taken as "
        f"{len(set(clusters))} groups of near-duplicates. If a patient has several files, scores will be too good"
    )
    splits = defaultdict(set)
    for item in items:
        splits[item.group].add(item.split)
    notes = [note, *few_groups(found)]
    if crossing := sorted(group for group, used in splits.items() if len(used) > 1):
        notes.append(f"{len(crossing)} near-duplicate group(s) are in two splits, as that of {crossing[0]}")
    return replace(found, notes=(*found.notes, *notes))


def _first_frame(item: Item):
    try:
        frame, _ = next(iter_frames(item.clip, 1, notes=[]))
    except UnreadableClip as error:
        return error
    return resize(frame, 32)
