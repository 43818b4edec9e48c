"""The one error class whose text is written for users."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SpoError(Exception):
    """Something the user can put right: one clear sentence saying what, which value, and what is accepted.

    The command line prints it and exits with code 2; the WebUI shows it in the tab; the API answers 4xx with it.
    """


def nearest(name: str, choices: Iterable[str]) -> str:
    """`, did you mean "x"?` for the closest of `choices`, or an empty string when none is close."""
    found = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f', did you mean "{found[0]}"?' if found else ""
