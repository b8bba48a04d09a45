"""Old name of `uscl_hub.clips.media`, kept for code that imports it."""

from uscl_hub.clips.media import *  # noqa: F403
