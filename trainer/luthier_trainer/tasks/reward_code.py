"""The reward type `python`: a function of the user, called in a process of its own that has no credentials.

The process lives as long as the training. Each call is one message to it and one answer, both JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.grpo import RewardFunction
from luthier_api.run import Origin
from luthier_api.secrets import VARIABLES
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks import reward_process
from luthier_trainer.workspace import provenance

if TYPE_CHECKING:
    from luthier_trainer.tasks.rewards import Completions

FUNCTION = "reward"  # where the job names none
SECONDS = 60  # for a call, where the job sets none
END_SECONDS = 5.0


def keep(reward: RewardFunction, where: str, copy: Path) -> Origin:
    """Copy the code of a reward to `copy`, and return its origin. Raises Failure if it cannot be read or is no Python.

    A config map may change while the job works; the copy does not.
    """
    path, named = Path(str(reward.file)), f"{where}.file"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{named}: {path}: {error.strerror}. Name a file that the pods see, for example of a config map in"
            " spec.volumes",
        ) from None
    try:
        compile(content, str(path), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{named}: {path} is no Python: {error}") from None
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(content)
    origin = provenance.of_data(copy, named)
    stat = path.stat()
    return origin.model_copy(update={"path": str(path), "mtime_ns": stat.st_mtime_ns})


def has_changed(reward: RewardFunction, copy: Path) -> bool:
    """Return whether the code of a reward is another than its copy. Code that is gone is no other."""
    path = Path(str(reward.file))
    return path.exists() and path.read_bytes() != copy.read_bytes()


@dataclass
class RatedByCode:
    """A function of the user, as a reward."""

    code: Path
    reward: RewardFunction
    where: str
    """Path of the reward in the spec."""
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _pipe: Connection | None = field(default=None, init=False)

    @property
    def function(self) -> str:
        return self.reward.function or FUNCTION

    def __call__(self, given: Completions) -> list[float]:
        """Return the rewards of completions. Raises Failure if the function has none."""
        prompts: list[Any] = list(given.prompts)
        completions: list[Any] = list(given.texts)
        if given.messages:
            prompts = [json.loads(prompt) for prompt in prompts]
            completions = [[{"role": "assistant", "content": text}] for text in completions]
        columns = {name: list(given.columns[name]) for name in self.reward.columns or []}
        arguments = columns | {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": [list(ids) for ids in given.ids],
        }
        answer = self._ask(arguments, len(completions))
        if "failure" in answer:
            raise self._failure("function", answer["failure"])
        return [float(reward) for reward in answer["rewards"]]

    def _failure(self, name: str, what: str) -> Failure:
        self.stop()
        return Failure(ExitCode.INVALID_SPEC, f"{self.where}.{name}: {self.function} of {self.reward.file} {what}")

    def _ask(self, arguments: Mapping[str, Any], count: int) -> dict[str, Any]:
        """Return the answer of the process, which is started for the first call. Raises Failure."""
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        assert self._process is not None
        seconds = self.reward.timeout_seconds or SECONDS
        try:
            self._pipe.send_bytes(json.dumps(arguments).encode())
            if not self._pipe.poll(seconds):
                raise self._failure(
                    "timeoutSeconds",
                    f"has not rated {count} completions within {seconds} s; make it faster, or raise it",
                )
            answer: dict[str, Any] = json.loads(self._pipe.recv_bytes())
        except (EOFError, ConnectionError):
            try:
                code: int | str = self._process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                code = "unknown"
            raise self._failure("function", f"has ended its process (exit code {code})") from None
        return answer

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
        arguments = [str(theirs.fileno()), str(self.code), str(self.reward.file), self.function]
        self._process = subprocess.Popen(
            [sys.executable, "-m", reward_process.__name__, *arguments],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def stop(self) -> None:
        """End the process."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
        self._process = self._pipe = None
