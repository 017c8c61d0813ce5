import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """What a user can fix, in one line: what is wrong, where, and the remedy. A command line prints it and exits with status 2.

    Any other exception is a bug and keeps its traceback.
    """


def most_like(word: str, known: Iterable[str]) -> str | None:
    """The known word that a mistyped one most likely stands for, if there is one."""
    by_lower_case = {other.lower(): other for other in known}
    close = difflib.get_close_matches(word.lower(), by_lower_case, 1, 0.7)
    return by_lower_case[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about a mistyped word. Empty if no known word is like it."""
    close = most_like(word, known)
    return f". Did you mean {close}?" if close else ""
