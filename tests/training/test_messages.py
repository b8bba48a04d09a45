"""How the commands end: one line, the right status, nothing lost."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT

from training.messages import command, markdown, one_line, without_folders
from uscl_hub.errors import UserError

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def ending(main, capsys):
    with pytest.raises(SystemExit) as stop:
        command(main, prefix="x.py: ", interrupted="start again")
    return stop.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, line",
    [
        (UserError("a.csv: no column\npath"), "x.py: a.csv: no column path"),
        (UserError("a\x1b[31m\u202eb.mp4: is empty"), r"x.py: a\x1b[31m\u202eb.mp4: is empty"),
        (OSError(errno.ENOSPC, "No space left on device", "a.txt"), "x.py: .*No space left on device: 'a.txt'; .*room"),
        (OSError(errno.EROFS, "Read-only file system", "a.txt"), "x.py: .*Read-only file system: 'a.txt'; choose"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "x.py: .*Permission denied: 'a.txt'; choose"),
    ],
)
def test_one_line_for_what_a_user_can_mend(error, line, capsys):
    import re

    code, _ = ending(raising(error), capsys)
    assert "\n" not in code and (code == line or re.match(line.replace("\\", "\\\\"), code)), code


def test_a_fault_of_the_program_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        command(lambda: 1 / 0)


def test_the_end_without_a_fault(capsys):
    assert ending(lambda: None, capsys) == (None, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals(number, capsys):
    def main():
        os.kill(os.getpid(), number)
        time.sleep(10)

    outside = signal.signal(number, signal.default_int_handler)  # nohup, around the tests, would have it ignored
    try:
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        assert ending(main, capsys) == (128 + number, "x.py: start again\n")
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    finally:
        signal.signal(number, outside)


def test_what_nohup_ignores_stays_ignored(capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert ending(lambda: os.kill(os.getpid(), signal.SIGHUP), capsys) == (None, "")
    finally:
        signal.signal(signal.SIGHUP, before)


def piped(code):
    """Status and stderr of a process whose reader closes the pipe at once."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    return process.wait(timeout=600), process.stderr.read()


def test_a_closed_pipe_ends_a_command_quietly():
    code = "from training.messages import command; command(lambda: [print('x' * 99) for _ in range(9999)] and None)"
    assert piped(code) == (141, "")


def test_a_closed_pipe_does_not_end_work():
    code = (
        "import sys; from training.messages import command, going_on_unread, say\n"
        "def main():\n"
        "    with going_on_unread():\n"
        "        for _ in range(9999): say('x' * 99)\n"
        "        print('reached', file=sys.stderr)\n"
        "command(main)"
    )
    assert piped(code) == (0, "reached\n")


def test_text_for_tables():
    assert one_line("a\n\n| b\r\x1b]0;x\x07") == r"a | b \x1b]0;x\x07"
    assert markdown("<script>`x` | *y*\n\n# z") == r"&lt;script&gt;\`x\` \| \*y\* \# z"
    assert markdown("_a_ b__c val_loss _") == r"\_a\_ b\_\_c val_loss \_"
    assert markdown("CC BY 4.0") == "CC BY 4.0"


@pytest.mark.parametrize(
    "value, shown",
    [
        ("/home/ann/scans", ".../scans"),
        ("ours=~/scans", "ours=.../scans"),
        ("--data=/home/ann/scans", "--data=.../scans"),
        ("C:\\Users\\ann\\scans", ".../scans"),
        ("ours=/tmp/run-{seed}/export@112", "ours=.../export@112"),
        (["/a/b", {"/a/c": ("/d/e", 3)}, None], [".../b", {".../c": [".../e", 3]}, None]),
        ("runs/evaluate", "runs/evaluate"),
        ("(patient/\\d+)", "(patient/\\d+)"),
        ("CC BY/4", "CC BY/4"),
    ],
)
def test_what_others_read_names_no_folder_of_this_machine(value, shown):
    assert without_folders(value) == shown
