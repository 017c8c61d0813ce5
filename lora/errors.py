"""The one class of error for what the user can mend."""


class UserError(ValueError):
    """What is wrong, where, and what to do, in one line. The command line prints it and exits with status 2.

    Anything else that is raised is a bug and keeps its traceback.
    """
