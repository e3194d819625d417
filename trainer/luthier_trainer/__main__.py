"""Entry point of the trainer image: `python -m luthier_trainer prepare|train|generate|publish [--run FILE]`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from luthier_api.exitcodes import ExitCode
from luthier_api.variables import Variables
from luthier_trainer.process import VERBS
from luthier_trainer.supervisor import main


class Parser(argparse.ArgumentParser):
    """argparse, with our exit code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        self.exit(int(ExitCode.INVALID_SPEC), f"{self.format_usage()}{self.prog}: {message}\n")


def run() -> int:
    parser = Parser(prog="python -m luthier_trainer", description="Run one phase of a job.")
    parser.add_argument("verb", choices=VERBS)
    parser.add_argument("--run", type=Path, metavar="FILE", default=os.environ.get(Variables.RUN), help=f"run config; default: ${Variables.RUN}")
    options = parser.parse_args()
    if options.run is None:
        parser.error(f"--run is missing, and {Variables.RUN} is not set")
    return main(options.verb, options.run)


if __name__ == "__main__":
    raise SystemExit(run())
