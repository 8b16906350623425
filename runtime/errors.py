"""The one root of all errors that a user can cause."""


class AccuQuantError(Exception):
    """What was found, what is allowed, what to do next - in one message; commands print it without a traceback."""
