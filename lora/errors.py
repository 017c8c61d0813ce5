"""UserError, the one class of error that a user can fix."""


class UserError(ValueError):
    """One line: what is wrong, where, and the remedy. A command line prints it and exits with status 2.

    Any other exception is a bug and keeps its traceback.
    """
