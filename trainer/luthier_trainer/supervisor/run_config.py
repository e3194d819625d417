"""Reads the run config with its types. PID 1 does this first, so that a mistake costs no import of torch."""

from __future__ import annotations

from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.problems import InvalidDocument, Problem
from luthier_api.run import FineTuneRun, GenerateRun, read_run
from luthier_api.variables import Variables
from luthier_trainer.runtime.commands import KINDS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.supervisor.redaction import redact

SHOWN_CHARACTERS = 100  # of a value: a longer one would push the next problem out of the termination message


def read(verb: str, path: Path) -> FineTuneRun | GenerateRun:
    """The run config in `path`, of a kind that the verb works on.

    Raises Failure: MISCONFIGURED if the file cannot be read, INVALID_SPEC with the path of each wrong field.
    """
    try:
        run = read_run(path.read_bytes())
    except OSError as error:
        message = f"{Variables.RUN}: cannot read the run config {path}: {error.strerror}"
        raise Failure(ExitCode.MISCONFIGURED, message) from error
    except InvalidDocument as error:
        raise Failure(ExitCode.INVALID_SPEC, "; ".join(describe(problem) for problem in error.problems)) from None
    if KINDS.get(verb, run.kind) != run.kind:
        message = f"kind: {verb} needs a {KINDS[verb]}, but {path.name} describes a {run.kind}"
        raise Failure(ExitCode.INVALID_SPEC, message)
    return run


def describe(problem: Problem) -> str:
    """One line about a wrong field, with a value that is short and without tokens."""
    if problem.value is None:
        return str(problem)
    # Redacted before it is cut: half a token would not be recognised.
    value = redact(problem.value)
    if len(value) > SHOWN_CHARACTERS:
        value = f"{value[:SHOWN_CHARACTERS]}…"
    return str(Problem(problem.path, problem.message, value))
