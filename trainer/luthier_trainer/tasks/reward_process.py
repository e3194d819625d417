"""The process in which a reward's Python code runs: `python -m luthier_trainer.tasks.reward_process`.

Reads the arguments of each call from a pipe, and writes the rewards, or why there are none. Imports nothing that the
code does not ask for.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

MODULE = "luthier_reward"
CHARACTERS = 500  # of an exception's text


class NoRewards(Exception):
    """The function has returned something else than rewards. The text goes on after the name of the function."""


def main(handle: int, code: str, shown: str, function: str) -> None:
    """Answer calls until the pipe is closed. `code`: the file that is run; `shown`: its name in messages."""
    os.dup2(2, 1)  # what the code prints is for the log
    calls = Connection(handle)
    rate: Callable[..., Any] | None = None
    while True:
        try:
            arguments = json.loads(calls.recv_bytes())
        except EOFError:
            return
        try:
            if rate is None:
                rate = loaded(code, function)
            answer: dict[str, Any] = {"rewards": checked(rate(**arguments), len(arguments["completions"]))}
        except NoRewards as error:
            answer = {"failure": str(error)}
        except BaseException as error:  # also SystemExit
            answer = {
                "failure": f"raised {type(error).__name__}: {str(error)[:CHARACTERS]}{line_of(error, code, shown)}"
            }
        calls.send_bytes(json.dumps(answer).encode())


def loaded(code: str, function: str) -> Callable[..., Any]:
    """Return the function of a file, which is run as a module. Raises what the file raises."""
    loader = importlib.machinery.SourceFileLoader(MODULE, code)  # whatever the suffix is
    spec = importlib.util.spec_from_loader(MODULE, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module
    sys.dont_write_bytecode = True
    loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        there = sorted(name for name, value in vars(module).items() if callable(value) and not name.startswith("_"))
        raise NoRewards(f"does not exist (functions: {', '.join(there) or 'none'})")
    return found


def checked(found: Any, count: int) -> list[float]:
    """Return what the function has returned as `count` finite numbers. Raises NoRewards if it is none."""
    found = found.tolist() if hasattr(found, "tolist") else found  # of numpy, of torch
    if not isinstance(found, list | tuple):
        raise NoRewards(f"has returned {article(found)} instead of a list of numbers")
    if len(found) != count:
        raise NoRewards(f"has returned {len(found)} rewards for {count} completions")
    return [number(value, i) for i, value in enumerate(found)]


def number(value: Any, i: int) -> float:
    """Return a reward. `i`: of which completion. Raises NoRewards if it is no finite number."""
    value = value.item() if hasattr(value, "item") else value
    if not isinstance(value, int | float):
        raise NoRewards(f"has returned {article(value)} as the reward of completion {i} instead of a number")
    if not math.isfinite(value):
        raise NoRewards(f"has returned {value} as the reward of completion {i}; return a finite number")
    return float(value)


def article(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def line_of(error: BaseException, code: str, shown: str) -> str:
    """Return where in the code an exception was raised last."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == code]
    return f" (line {lines[-1]} of {shown})" if lines else ""


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:5])
