"""The command line `luthier`: runs the manifests of a cluster on one machine, and prints what an administrator needs.

`commands` has the verbs. For `run` and `plan`, `manifests` reads files, `local` maps a job to this machine,
`supervised` is one process of it, `runner` runs the phases, `screen` displays them. Nothing here imports torch: the
phases are separate processes.
"""

from __future__ import annotations

import sys

from luthier_api.exitcodes import ExitCode

USAGE_ERROR = 2  # click's exit code for a wrong command line; reported as INVALID_SPEC, like other mistakes of the user


def main() -> None:
    """Entry point of the program. Exit codes are those of `luthier_api.exitcodes`."""
    from luthier_cli.commands import app

    try:
        app(prog_name="luthier")
    except SystemExit as end:
        sys.exit(int(ExitCode.INVALID_SPEC) if end.code == USAGE_ERROR else end.code)
