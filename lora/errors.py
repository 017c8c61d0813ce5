class UserError(ValueError):
    """What a user can fix, in one line: what is wrong, where, and the remedy. A command line prints it and exits with status 2.

    Any other exception is a bug and keeps its traceback.
    """
