"""Asks a module of the trainer for a JSON document. The command line itself never imports the trainer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_cli.manifests import Refused


def ask(module: str, *arguments: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Return what `module` prints. Raises Refused with its last line of stderr if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env=dict(environment),
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip() or f"{module} ended with code {done.returncode}").splitlines()[-1]
        code = next((code for code in ExitCode if int(code) == done.returncode), ExitCode.TRAINING_ERROR)
        raise Refused([last], code)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer
