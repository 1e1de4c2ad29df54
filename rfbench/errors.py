"""The one exception that reaches a user as a sentence instead of a traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

AGAIN = "; run the command that began it again"  # of a run that is not whole: the end of a sentence


class UserError(Exception):
    """A request that cannot be carried out: one sentence that says what, where and what to do.

    The command line prints the sentence and exits with `code`: 2 when the request was wrong, 1 when a
    right request failed while running (a full disk, a video that broke, a run that somebody else holds).
    """

    def __init__(self, sentence: str, *, code: int = 2) -> None:
        super().__init__(sentence)
        self.code = code


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for a near miss among `known`, else the names there are."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; there is {', '.join(names)}" if names else "; there is none"
