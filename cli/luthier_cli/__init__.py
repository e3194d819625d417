"""The command line `luthier`: the same manifests on a laptop, and what an administrator prints.

`commands` are the verbs. For `run` and `plan`: `manifests` reads files, `local` lays a job out on this machine,
`supervised` is one process of it, `runner` takes a job through its phases, `screen` shows that. Nothing here imports
torch: the phases are processes.
"""

from __future__ import annotations

import sys

from luthier_api.exitcodes import ExitCode

# what click ends with when it cannot read the command line; for us that is a mistake in the user's words like any other
USAGE = 2


def main() -> None:
    """Entry point of the program. Exit codes are those of `luthier_api.exitcodes`."""
    from luthier_cli.commands import app

    try:
        app(prog_name="luthier")
    except SystemExit as end:
        sys.exit(int(ExitCode.INVALID_SPEC) if end.code == USAGE else end.code)
