"""Old name of `uscl_hub.features.embed`, kept for code that imports it."""

from uscl_hub.features.embed import embed, search  # noqa: F401
