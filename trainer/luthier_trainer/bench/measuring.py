"""The callback that measures a training from inside its process, a block of steps at a time.

Every program that is compared trains in a process of its own, and between two blocks it waits until the command lets it
go on. So the programs take turns on the same device, and what slows the machine down for some seconds slows all.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any, TextIO

import torch
from transformers import TrainerCallback

from luthier_trainer.bench.rounds import GO, Course
from luthier_trainer.runtime import memory_use


class Channel:
    """The messages between a process that is measured and the command."""

    def __init__(self, output: TextIO, commands: TextIO) -> None:
        self._output, self._commands = output, commands

    def send(self, event: str, **facts: Any) -> None:
        print(json.dumps({"event": event} | facts), file=self._output, flush=True)

    def wait(self) -> None:
        """Return when the command says so. The process ends if the command has ended."""
        if self._commands.readline().strip() != GO:
            os._exit(1)


class Measuring(TrainerCallback):
    """Measures blocks of steps, and ends the process after the last one."""

    def __init__(self, channel: Channel, course: Course) -> None:
        self._channel, self._course = channel, course
        self._begin: dict[str, float] = {}
        self._losses: list[float] = []
        self.loop: Any = None
        """Our trainer, which counts tokens. `training.main` sets it; other programs have none."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self._losses.append(float(logs["loss"]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step - self._course.warmup
        if done < 0 or done % self._course.block:
            return
        if done:
            end = self._now(state)
            block = {name: end[name] - value for name, value in self._begin.items()}
            self._channel.send("block", losses=self._losses, **block)
        else:
            self._channel.send("warm", **peak_memory())
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        if done == self._course.block * self._course.rounds:
            self._channel.send("done", **peak_memory())
            os._exit(0)  # neither a result nor a checkpoint is wanted
        self._channel.wait()
        self._begin = self._now(state)

    def _now(self, state: Any) -> dict[str, float]:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        tokens, computed = tokens_so_far(self.loop, state) if self.loop is not None else (0, 0)
        return {"wall": time.monotonic(), "cpu": time.process_time(), "tokens": tokens, "computed": computed}


def tokens_so_far(loop: Any, state: Any) -> tuple[int, int]:
    """Return the tokens that our trainer has learnt from, and those that it has computed, padding included."""
    from luthier_trainer.training.result import PADDING

    seen = state.num_input_tokens_seen
    padding = sum(entry.get(PADDING, 0.0) for entry in state.log_history)
    return seen + int(loop.tokens.item()), int(seen + padding + loop.computed_tokens)


def peak_memory() -> dict[str, int]:
    """Return the most memory so far, in bytes: of the GPU in tensors and reserved by torch, or of the process."""
    if torch.cuda.is_available():
        used = memory_use.peak(torch.device("cuda"))
        return {"peak": used.tensors, "reserved": used.reserved}
    return {"peak": memory_use.peak(torch.device("cpu")).tensors}
