"""What the commands say, and how each of them ends."""

import contextlib
import errno
import os
import signal
import sys
import threading

from training import distributed
from uscl_hub.errors import UserError


def say(message: str) -> None:
    """Print a line, once for all ranks."""
    if distributed.rank() == 0:
        print(message, flush=True)


def one_line(error: BaseException | str) -> str:
    """The message without its line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def user_errors_end(prefix: str = ""):
    """End the program with one line where a user's mistake or a full disk reaches this point."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{prefix}{error}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        again = "the last checkpoint, if any, is intact: make room and start it again to go on"
        raise SystemExit(f"{prefix}{error}; {again}") from None


def command(main, prefix: str = "", interrupted: str = "interrupted; start it again to go on") -> None:
    """Run `main()` as the whole program.

    Ends with status 1 and one line on stderr for a user's mistake or a full disk, 128 + the signal's number after
    Ctrl-C, SIGTERM or SIGHUP, 141 when the reader of the output has gone; otherwise with what `main` returns.

    Args:
        main: takes no arguments.
        prefix: of the line, such as "release.py: ".
        interrupted: what is printed after a signal: how to go on.
    """
    try:
        with user_errors_end(prefix), signals_interrupt():
            status = main()
            sys.stdout.flush()
    except KeyboardInterrupt as stop:
        print(f"{prefix}{interrupted}", file=sys.stderr)
        status = 128 + (stop.args[0] if stop.args else signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter's last flush complains
        status = 128 + signal.SIGPIPE
    sys.exit(status)


def _stopping():
    """The signals that ask a program to end; those that are ignored (nohup) stay ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def _handling(handler):
    before = {number: signal.signal(number, handler) for number in _stopping()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextlib.contextmanager
def signals_interrupt():
    """SIGTERM and SIGHUP raise KeyboardInterrupt(number), as Ctrl-C does."""

    def handler(number, frame):
        raise KeyboardInterrupt(number)

    with _handling(handler):
        yield


@contextlib.contextmanager
def signals_set():
    """Yields an event that Ctrl-C, SIGTERM or SIGHUP sets, so that what runs can finish. A second one interrupts."""
    event = threading.Event()

    def handler(number, frame):
        if event.is_set():
            raise KeyboardInterrupt(number)
        event.set()

    with _handling(handler):
        yield event
