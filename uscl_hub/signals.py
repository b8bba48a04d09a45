"""The signals that ask a program to end: Ctrl-C, SIGTERM and SIGHUP."""

import contextlib
import signal
import threading
from typing import Callable, Iterator


def _ending() -> list[int]:
    """Their numbers; those that are ignored (nohup) stay ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def handled(handler: Callable) -> Iterator[None]:
    """handler(number, frame) is called at them; in a thread that is not the main one, which cannot arrange it, not."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _ending()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP raise KeyboardInterrupt(number), as Ctrl-C does."""

    def handler(number, frame):
        raise KeyboardInterrupt(number)

    with handled(handler):
        yield
