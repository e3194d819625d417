"""The program `luthier`, called as a user calls it.

`luthier` runs it inside the test's process, because most calls take less time than a Python process that imports the
program: 0.05 s instead of 0.4 s. `start` runs a process, for what only a process has: signals, and being two at once.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from luthier_cli import main

# Nobody is logged in to the Hub, and lines are not broken.
ENVIRONMENT = {"COLUMNS": "200", "NO_COLOR": "1", "HF_TOKEN_PATH": "/nobody/is/logged/in"}


def environment(changes: dict[str, str]) -> dict[str, str]:
    """The environment of a call: that of the tests without a token, `ENVIRONMENT`, and `changes`."""
    return {k: v for k, v in os.environ.items() if k != "HF_TOKEN"} | ENVIRONMENT | changes


def luthier(*words: str, cwd: Path | None = None, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the program in this process, with `env` on top of `environment`. The result is what a process would leave."""
    import huggingface_hub.constants

    out, err = io.StringIO(), io.StringIO()
    variables = environment(env)
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, variables, clear=True))
        # Hugging Face reads this variable once, when it is imported.
        stack.enter_context(patch.object(huggingface_hub.constants, "HF_TOKEN_PATH", variables["HF_TOKEN_PATH"]))
        stack.enter_context(patch.object(sys, "argv", ["luthier", *words]))
        stack.enter_context(patch.object(sys, "stdin", io.StringIO(stdin)))
        stack.enter_context(redirect_stdout(out))
        stack.enter_context(redirect_stderr(err))
        stack.enter_context(chdir(cwd or Path.cwd()))
        code = _exit_code()
    return subprocess.CompletedProcess(["luthier", *words], code, out.getvalue(), err.getvalue())


def _exit_code() -> int:
    """Call the program, and return the code that it exits with."""
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def start(*words: str, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """Start the program as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "luthier_cli", *words],
        cwd=cwd,
        env=environment(env),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
