"""Search in a feature table: the clips most similar to a file, or to one of the table's own."""

import os
from pathlib import Path

import numpy as np

from uscl_hub import sources
from uscl_hub.checkpoints import CheckpointError
from uscl_hub.clips import UnreadableClip, find_clips
from uscl_hub.clips.pictures import contact_sheet, tile
from uscl_hub.clips.read import read_clip
from uscl_hub.features.network import features_of, fingerprint, placed
from uscl_hub.features.table import THUMBNAIL, TableError, read_clips, read_settings
from uscl_hub.features.thumbnails import make_thumbnail, open_thumbnail
from uscl_hub.files import write_whole
from uscl_hub.load import load_meta_uscl_backbone
from uscl_hub.preprocess import create_transform
from uscl_hub.tensors import shorten

LARGEST = 1e18  # of a feature: the square of a larger one may be infinite
SIDE = 2 * THUMBNAIL  # pixels of a picture in the sheet


def search(query, features, *, k: int = 5, sheet=None, device: str = "cpu") -> list[dict]:
    """The k clips of a feature table most similar (cosine of the pooled vectors) to a file, or to one of its clips.

    Args:
        query: an image, video, DICOM file or folder of numbered frames; or the id of a clip in the table.
        features: a table of `embed`.
        sheet: write a PNG with the query and what was found.

    Returns [{'clip', 'similarity', 'frames'}], best first. Raises TableError, naming the table, if it is damaged or
    not of `embed`; ValueError for a query that is not one clip; CheckpointError if the model that made the table is
    not there any more, or has other weights.
    """
    settings, table = read_settings(features), read_clips(features)
    ids, thumbnails = table["clip"].to_pylist(), table["thumbnail"].to_pylist()
    vectors = np.array(table["feature"].to_pylist(), np.float32)
    if not (np.abs(vectors) < LARGEST).all():
        raise TableError(f"{features}: some features are not finite or absurd. Make it again with `uscl-hub embed`")
    others = list(range(len(ids)))
    if str(query) in ids:
        chosen = ids.index(str(query))
        vector, picture = vectors[chosen], thumbnails[chosen]
        others = [i for i in others if i != chosen]
    else:
        vector, picture = _features_of_query(query, features, settings, device)
        if len(vector) != vectors.shape[1]:
            raise TableError(f"{features}: its features have {vectors.shape[1]} numbers, the model's {len(vector)}")
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    similarity = unit @ (vector / max(np.linalg.norm(vector), 1e-12))
    best = sorted(others, key=lambda i: -similarity[i])[:k]
    if sheet:
        shown = [(f"query {Path(query).name}", picture)]
        shown += [(f"{ids[i]} {similarity[i]:.3f}", thumbnails[i]) for i in best]
        tiles = [tile([open_thumbnail(png).resize((SIDE, SIDE))], text) for text, png in shown]
        write_whole(sheet, lambda file: contact_sheet(tiles).save(file, "PNG"))
    counts = table["frames"].to_pylist()
    return [{"clip": ids[i], "similarity": float(similarity[i]), "frames": counts[i]} for i in best]


def _features_of_query(query, features, settings: dict, device: str) -> tuple[np.ndarray, bytes]:
    """Pooled vector and thumbnail of a file that is not in the table."""
    clips = find_clips([query])
    if len(clips) != 1:
        raise ValueError(
            f"{query}: holds {len(clips)} clips; a query is one image, video, DICOM file or folder of "
            "numbered frames, or the id of a clip in the table"
        )
    model = placed(_model_of(features, settings), device)
    if create_transform(model).keywords["size"] != settings["px"] or fingerprint(model) != settings["weights"]:
        raise CheckpointError(f"{settings['checkpoint']}: is not what {features} was made with any more: embed again")
    try:
        frames = read_clip(clips[0], settings["px"], crop=settings["crop"], stride=settings["stride"])
    except UnreadableClip as error:
        raise ValueError(str(error)) from error
    return features_of(model, frames.images).mean(0), make_thumbnail(frames)


def _model_of(features, settings: dict):
    """The model that made a table. A path in it is never asked of the Hub, which must not learn of people's paths."""
    name, checkpoint = settings["name"], settings["checkpoint"]
    if checkpoint is not None and not sources.is_beyond_doubt(checkpoint, name):
        checkpoint = Path(os.path.expanduser(checkpoint))
        if not checkpoint.exists():
            hub = f", or {sources.HUB}{shorten(settings['checkpoint'])} if a repository on the Hub was meant"
            raise CheckpointError(
                f"{features}: was made with the checkpoint {shorten(str(checkpoint))}, which is not there. Put it "
                f"there, or embed again with --checkpoint and its new path{'' if checkpoint.is_absolute() else hub}"
            )
    try:
        return load_meta_uscl_backbone(name, checkpoint=checkpoint, revision=settings["revision"])
    except ValueError as error:  # settings that contradict each other
        raise TableError(f"{features}: {error}") from error
