"""Files of the pod itself are never data: its environment holds the token of the Hub."""

from __future__ import annotations

from pathlib import Path

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import SYSTEM_FOLDERS
from luthier_trainer.runtime.failure import Failure


def refuse_system_file(path: Path, field: str) -> None:
    """Check that `path`, as the job names it, leads to no file of the system, also through links and `..`.

    The CRD refuses such a path by its text; where a link on a volume leads is only known here.
    Raises Failure if it does.
    """
    real = path.resolve()
    for folder in SYSTEM_FOLDERS:
        if real.is_relative_to(Path("/", folder)):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {path} leads to {real}, a file of the pod itself. Only files of volumes are data: name one"
                " there, or put the file itself where the link is",
            )
