"""The exception that carries an exit code and a message for the user."""

from __future__ import annotations

from luthier_api.exitcodes import ExitCode

START_OVER = "Start over: with --fresh on a laptop, under another metadata.name on a cluster"


class Failure(Exception):
    """A failure with a known cause. `message` is for the user: path of the field, what was found, what to do."""

    def __init__(self, code: ExitCode, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message

    def __reduce__(self) -> tuple[type[Failure], tuple[ExitCode, str]]:
        """Return how another process makes the same exception."""
        return type(self), (self.code, self.message)


class NothingLeft(Failure):
    """A failure because no row is left. It is none in a part of the rows, of which others are still to be read."""
