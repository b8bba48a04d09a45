"""What the commands say, and how each of them ends."""

import contextlib
import errno
import html
import os
import re
import signal
import sys
import threading
from pathlib import PurePosixPath, PureWindowsPath

from training import distributed
from uscl_hub.errors import UserError, printable
from uscl_hub.signals import handled, signals_interrupt

FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


def say(message: str) -> None:
    """Print a line, once for all ranks."""
    if distributed.rank() == 0:
        print(message, flush=True)


def one_line(error: BaseException | str) -> str:
    """The message without line breaks; other characters that a terminal would obey are written out, as \\x1b."""
    return printable(" ".join(str(error).split()))


def markdown(text: object) -> str:
    """One line of plain text for a Markdown table or HTML: nothing in it is markup."""
    # an underscore inside a word is plain, and so are brackets that no target follows
    special = r"([\\`*|~#]|\](?=[(\[:])|_(?![^\W_])|(?<![^\W_])_)"
    return re.sub(special, r"\\\1", html.escape(one_line(str(text)), quote=False))


def without_folders(value):
    """A copy for others to read of what JSON can hold: of absolute paths in it, only the last name is left.

    >>> without_folders({"data": "/home/ann/scans", "backbones": ["ours=/tmp/run/export@112", "random:resnet18"]})
    {'data': '.../scans', 'backbones': ['ours=.../export@112', 'random:resnet18']}
    """
    if isinstance(value, dict):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")
    kinds = [kind for kind in (PurePosixPath, PureWindowsPath) if path.startswith("~") or kind(path).is_absolute()]
    return f"{name}{equals}.../{kinds[0](path).name}" if kinds else value


@contextlib.contextmanager
def user_errors_end(prefix: str = ""):
    """End the program with one line where a user's mistake or a full disk reaches this point."""
    try:
        yield
    except UserError as error:
        raise SystemExit(one_line(f"{prefix}{error}")) from None
    except OSError as error:
        if error.errno in FULL:
            advice = "the last checkpoint, if any, is intact: make room and start it again to go on"
        elif error.errno in FORBIDDEN and error.filename is not None:
            advice = "choose another folder, or allow this one to be read and written"
        else:
            raise
        raise SystemExit(one_line(f"{prefix}{error}; {advice}")) from None


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


class _Unread:
    """A text stream whose reader may go away: what is written from then on is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _drop(self):
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text):
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self._drop()
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except BrokenPipeError:
            self._drop()


@contextlib.contextmanager
def going_on_unread():
    """Where the reader of the output goes away, what runs goes on: for work that is worth more than its messages."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Unread, before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def signals_set():
    """Yields an event that Ctrl-C, SIGTERM or SIGHUP sets, so that what runs can finish. A second one interrupts."""
    event = threading.Event()

    def handler(number, frame):
        if event.is_set():
            raise KeyboardInterrupt(number)
        event.set()

    with handled(handler):
        yield event
