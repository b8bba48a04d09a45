"""The one kind of error that a person using the product can mend."""


class UserError(Exception):
    """Its message is one line: it names the file or argument that is at fault and says what to do.

    Commands print it and end with status 1; anything else that is raised is a fault of the program.
    """
