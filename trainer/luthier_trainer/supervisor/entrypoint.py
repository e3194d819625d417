"""PID 1 of the trainer image, from its command line to its termination message. It never imports torch."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from luthier_api.exitcodes import ExitCode
from luthier_api.terminationlog import encode
from luthier_api.variables import Variables
from luthier_trainer.runtime.classify import classify
from luthier_trainer.runtime.commands import VERBS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.supervisor.redaction import redact
from luthier_trainer.supervisor.signals import Stop

TERMINATION_LOG = Path("/dev/termination-log")


class Parser(argparse.ArgumentParser):
    """argparse, with our exit code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(int(ExitCode.INVALID_SPEC), f"{self.format_usage()}{self.prog}: {message}\n")


def main(arguments: Sequence[str], stop: Stop) -> int:
    """Run the phase that the command line names. Returns the container's exit code."""
    parser = Parser(prog="python -m luthier_trainer", description="Run one phase of a job.")
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument(
        "--run",
        type=Path,
        metavar="FILE",
        default=os.environ.get(Variables.RUN) or None,
        help=f"run config; default: ${Variables.RUN}",
    )
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.error(f"--run is missing, and {Variables.RUN} is not set")
    return phase(options.verb, options.run, stop)


def phase(verb: str, path: Path, stop: Stop) -> int:
    """Run one phase and report how it ended, also where it fails. Returns the container's exit code."""
    began = time.monotonic()
    try:
        message = work(verb, path, stop)
    except Exception as error:
        if not isinstance(error, Failure):
            import traceback

            traceback.print_exc()
        code, text = classify(error)
        message = {"phase": VERBS[verb], "code": int(code), "reason": code.reason, "message": text, "lastLines": ""}
    message |= {"message": redact(message["message"]), "seconds": round(time.monotonic() - began, 1)}
    report(message)
    return int(message["code"])


def work(verb: str, path: Path, stop: Stop) -> dict[str, Any]:
    """Check the run config and the folders, then run the phase. Returns its TerminationMessage as plain data.

    Raises Failure.
    """
    # Imported here, so that an environment in which the types cannot be imported also ends with a message.
    from luthier_trainer.supervisor import folders, run_config
    from luthier_trainer.supervisor import main as supervisor

    run = run_config.read(verb, path)
    folders.check(Path(run.workspace))
    return supervisor.main(verb, run, path, stop).dump()


def report(message: dict[str, Any]) -> None:
    """Write a TerminationMessage, given as plain data, where the kubelet reads it, and a line of it to the log."""
    log = Path(os.environ.get(Variables.TERMINATION_LOG) or TERMINATION_LOG)
    try:
        if log != TERMINATION_LOG or log.exists():  # outside a pod there is none, and /dev is no place to make one
            log.write_bytes(encode(message))
    except OSError as error:
        print(f"supervisor: cannot write {log}: {error.strerror}", file=sys.stderr)
    text = f": {message['message']}" if message["message"] else ""
    print(
        f"supervisor: {message['phase']} ended with {message['code']} {message['reason']}{text}",
        file=sys.stderr,
        flush=True,
    )
