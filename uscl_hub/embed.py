"""Old name of `uscl_hub.features`, kept for code that imports it."""

from uscl_hub.features.embed import embed  # noqa: F401
from uscl_hub.features.search import search  # noqa: F401
