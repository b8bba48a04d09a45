"""COCO's average precision of instance masks, with a bootstrap over groups."""

import contextlib
import io

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from training.evaluation import intervals


def encode(mask: np.ndarray) -> dict:
    """A bool (H, W) mask as COCO's run lengths."""
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(code["size"]), "counts": code["counts"].decode()}


def average_precision(
    masks: np.ndarray, instances: list[list], groups: np.ndarray, draws: int = 1000, seed: int = 0
) -> dict[str, intervals.Estimate]:
    """COCO's mask AP (0.50:0.95) and AP50 over all images, with a bootstrap over groups. masks: bool (N, px, px).

    Values are pycocotools'; draws use its matches. AP is 0 where there is no detection at all.
    """
    _, group = np.unique(groups, return_inverse=True)
    counts = intervals.draw_groups(group.max() + 1, draws, seed)[:, group]
    evaluation = accumulated(masks, instances)
    if evaluation is None:
        return {name: intervals.Estimate(0.0, np.zeros(draws)) for name in ("COCO AP", "COCO AP50")}
    precision = evaluation.eval["precision"]  # (IoU, recall, class, area, detections)
    values = precision.mean(), precision[0].mean()
    found = [e for e in evaluation.evalImgs if e]
    score = np.concatenate([e["dtScores"] for e in found])
    order = np.argsort(-score, kind="mergesort")
    hit = np.concatenate([e["dtMatches"] > 0 for e in found], axis=1)[:, order]
    image = np.repeat([e["image_id"] - 1 for e in found], [len(e["dtScores"]) for e in found])[order]
    drawn = np.array([weighted_precision(hit, c[image], c.sum(), evaluation.params.recThrs) for c in counts])
    names_draws = zip(("COCO AP", "COCO AP50"), values, (drawn.mean(1), drawn[:, 0]))
    return {name: intervals.Estimate(value, d) for name, value, d in names_draws}


def weighted_precision(hit: np.ndarray, weight: np.ndarray, lesions: int, recalls: np.ndarray) -> np.ndarray:
    """COCO's interpolated average precision at every IoU, float (T,), of detections that count `weight` times.

    hit: bool (T, D), best score first; weight: int (D,); recalls: float (R,), where precision is read.
    """
    true = np.cumsum(hit * weight, axis=1)
    precision = true / np.maximum(np.cumsum(weight), 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    envelope = np.pad(envelope, ((0, 0), (0, 1)))
    reached = [np.searchsorted(row / lesions, recalls, side="left") for row in true]
    return np.take_along_axis(envelope, np.array(reached), axis=1).mean(1)


def accumulated(masks: np.ndarray, instances: list[list]) -> COCOeval | None:
    """pycocotools' evaluation, accumulated; None without any detection. One lesion an image, every size."""
    found = [
        {"image_id": i, "category_id": 1, "score": score, "segmentation": code}
        for i, one in enumerate(instances, start=1)
        for score, code in one
    ]
    if not found:
        return None
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": m.shape[0], "width": m.shape[1]} for i, m in enumerate(masks, start=1)],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "area": int(m.sum()), "segmentation": encode(m)}
            for i, m in enumerate(masks, start=1)
        ],
        "categories": [{"id": 1, "name": "lesion"}],
        "info": {},
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "segm")
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [10]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation
