"""Old home of what is in this package's modules now, kept for code that imports it."""

from uscl_hub.media import *  # noqa: F403
