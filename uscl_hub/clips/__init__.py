"""Clips: found in folders, decoded, cropped to the moving image. `from uscl_hub.clips import find_clips, read_clip`."""

import importlib

_HOME = {
    "Clip": "clip",
    "UnreadableClip": "clip",
    "find_clips": "find",
    "Report": "find",
    "content_hash": "decode",
    "iter_frames": "decode",
    "Frames": "read",
    "read_clip": "read",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)  # on demand: reading needs SciPy
