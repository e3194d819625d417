"""The first thing that PID 1 does: read the run config, so that a mistake in it costs a tenth of a second.

Works on plain data, because to import the types costs more than that. Neighbours: `shape` (what is wrong with which
field), `pid1`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.variables import Variables
from luthier_trainer.runtime.commands import KINDS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.supervisor import shape


def read(verb: str, path: Path) -> dict[str, Any]:
    """The run config as it stands, of its kind's shape, and of a kind that the verb works on. Raises Failure with the
    path of each wrong field.
    """
    document = parse(path)
    if problems := shape.problems(document):
        raise Failure(ExitCode.INVALID_SPEC, "; ".join(problems))
    kind = document["kind"]
    if KINDS.get(verb, kind) != kind:
        raise Failure(ExitCode.INVALID_SPEC, f"kind: {verb} needs a {KINDS[verb]}, but {path.name} describes a {kind}")
    return document


def parse(path: Path) -> Any:
    """What the file says. Raises Failure when it cannot be read, or is no JSON."""
    try:
        return json.loads(path.read_bytes().decode())
    except OSError as error:
        raise Failure(
            ExitCode.MISCONFIGURED, f"{Variables.RUN}: cannot read the run config {path}: {error.strerror}"
        ) from error
    except (ValueError, RecursionError) as error:  # both say where
        raise Failure(ExitCode.INVALID_SPEC, f"run config: invalid JSON: {error}") from None
