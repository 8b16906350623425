"""The one root of all errors that a user can cause, and what a message offers instead of a name that is nowhere."""

from collections.abc import Iterable
from difflib import get_close_matches


class AccuQuantError(Exception):
    """What was found, what is allowed, what to do next - in one message; commands print it without a traceback."""


def near(name: str, known: Iterable[str]) -> str:
    """The known names that look most like `name`, as the end of a sentence; says so where there is none."""
    found = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"near it {'is' if len(found) == 1 else 'are'} {', '.join(found)}" if found else "no name is near it"
