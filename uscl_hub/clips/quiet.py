"""Silence of the libraries that read files, in several threads at once."""

import contextlib
import logging
import threading
import warnings

_lock = threading.Lock()
_inside = 0
_outside = contextlib.ExitStack()  # puts back what the first one in found


@contextlib.contextmanager
def quiet():
    """Within it, no warning and no log line of pydicom is shown: they quote tag values. Warnings' filters belong to the
    whole process, so that threads enter and leave in any order: the last one out puts back what the first one found."""
    global _inside
    with _lock:
        if not _inside:
            logger = logging.getLogger("pydicom")
            _outside.callback(setattr, logger, "disabled", logger.disabled)
            _outside.enter_context(warnings.catch_warnings())
            logger.disabled = True
            warnings.simplefilter("ignore")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _outside.close()
