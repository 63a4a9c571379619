"""Errors of the library.  Each is also the standard exception it specialises, so ``except ValueError`` still works.

A message says what was found, what was expected, and what to type.
"""


class UniOPDError(Exception):
    """Root of all errors raised on purpose by ``uniopd_mm``."""


class ConfigError(UniOPDError, ValueError):
    """Settings that cannot be used; the message lists every problem found, not only the first."""


class DataError(UniOPDError, ValueError):
    """A data row (or file) that cannot be used; the message names file and row."""


class AlignmentError(UniOPDError, ValueError):
    """Student and teacher sequences that cannot be laid onto each other."""


class ResumeError(UniOPDError, RuntimeError):
    """A run folder that cannot be continued with the given settings."""
