"""Errors that the user can correct."""


class UserError(Exception):
    """Its message is one line: it names the file or argument that is at fault and says what to do.

    Commands print it and end with status 1; anything else that is raised is a fault of the program.
    """


class CheckpointError(UserError, RuntimeError):
    """A checkpoint is missing, damaged or not what it should be."""


def printable(text: str) -> str:
    """Text for a terminal, in one line: whatever a file name or a configuration holds, nothing of it is obeyed."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
