"""Compares the first steps with the plan: their time and the peak of memory.

After WATCHED steps the operator and the user know whether the plan was right, while the training can still be changed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from luthier_api import metrics
from luthier_api.canary import remarks
from luthier_api.status import Plan
from luthier_trainer.runtime import memory_use
from luthier_trainer.runtime.memory_use import MemoryUse
from luthier_trainer.runtime.notices import notice
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.training.callbacks import LEFT_OUT, Callback
from luthier_trainer.workspace import gpu_memory
from luthier_trainer.workspace.space import amount

WATCHED = 20  # steps of this attempt
RANKS_SHOWN = 8  # in the log


class Canary(Callback):
    """Reports the memory that is used, and gives notice if a step takes other than the planned time or memory."""

    def __init__(self, telemetry: Telemetry, plan: Plan, processes: int) -> None:
        """`processes`: of a node."""
        self.telemetry, self.plan, self._processes = telemetry, plan, processes
        self._last = self._first = 0
        self._left_out = 0
        self._ended: float | None = None
        self._seconds: list[float] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        steps = min(WATCHED, state.max_steps - state.global_step)
        self._first, self._last = state.global_step, state.global_step + steps
        self._left_out = min(LEFT_OUT, steps // 2)  # of a short training, half

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step > self._last:
            return
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # the host is ahead of the device
        now = time.monotonic()
        if self._ended is not None and state.global_step - self._first > self._left_out:
            self._seconds.append(now - self._ended)
        self._ended = now
        if state.global_step == self._last:
            self._compare(args, state)

    def _interrupted(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """What follows the end of a step does not belong to the next one, if it is no training."""
        self._ended = None

    on_save = on_evaluate = _interrupted

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if "loss" in (logs or {}):
            self.report(self.gathered(args.device))

    def _compare(self, args: TrainingArguments, state: TrainerState) -> None:
        """Compare with the plan. All ranks call this function."""
        ratios: list[float | None] = [None, None]
        texts = []
        if self._seconds and self.plan.seconds and self.plan.steps:
            taken, planned = statistics.median(self._seconds), self.plan.seconds / self.plan.steps
            ratios[0] = taken / planned
            self.telemetry.set(metrics.PLAN_SECONDS_RATIO, taken / planned)
            texts.append(f"a step takes {taken:.3g} s, planned {planned:.3g} s")
        used, expected = self.fullest(self.gathered(args.device)), self.planned()
        if expected:
            ratios[1] = used.tensors / expected
            self.telemetry.set(metrics.PLAN_MEMORY_RATIO, used.tensors / expected)
            texts.append(f"the peak of memory is {amount(used.tensors)}, planned {amount(expected)}")
        if not self.loop.ranks.first:
            return
        if texts:
            print(f"step {state.global_step}/{state.max_steps}  plan: {'; '.join(texts)}", flush=True)
        # Rounded as the operator reads them, so that its texts are the same.
        for text in remarks(self.plan, *map(metrics.figure, ratios)):
            notice(text)

    def gathered(self, device: torch.device) -> list[MemoryUse]:
        """Return the peak of each rank. All ranks call this function."""
        mine = memory_use.peak(device)
        each = self.loop.ranks.gather([mine.tensors, mine.reserved])
        return [MemoryUse(round(tensors), round(reserved)) for tensors, reserved in each]

    def fullest(self, peaks: Sequence[MemoryUse]) -> MemoryUse:
        """Return the peak of the fullest GPU, or of the node whose processes hold most together."""
        if self._on_gpu:
            groups = [[peak] for peak in peaks]
        else:
            groups = [list(peaks[at : at + self._processes]) for at in range(0, len(peaks), self._processes)]
        sums = [MemoryUse(sum(p.tensors for p in group), sum(p.reserved for p in group)) for group in groups]
        return max(sums, key=lambda peak: (peak.tensors, peak.reserved))

    @property
    def _on_gpu(self) -> bool:
        return bool(self.loop.args.device.type == "cuda")

    def planned(self) -> int | None:
        """Return what the plan expects of `fullest`; None if it does not know all of it."""
        memory = self.plan.memory
        if memory is None or memory.partial:
            return None
        return gpu_memory.tensors(memory) if self._on_gpu else memory.host_bytes

    def report(self, peaks: Sequence[MemoryUse]) -> None:
        """Set the metrics of memory."""
        used, expected = self.fullest(peaks), self.planned()
        present = memory_use.now(self.loop.args.device)
        self.telemetry.set(metrics.MEMORY_ALLOCATED, present.tensors)
        self.telemetry.set(metrics.MEMORY_RESERVED, present.reserved)
        self.telemetry.set(metrics.MEMORY_PEAK, used.tensors)
        self.telemetry.set(metrics.MEMORY_PEAK_RESERVED, used.reserved)
        if expected:
            self.telemetry.set(metrics.MEMORY_PLANNED, expected)

    def final(self) -> dict[str, float]:
        """Return the metrics of memory of the whole attempt, and print those of each rank. All ranks call this."""
        peaks = self.gathered(self.loop.args.device)
        self.report(peaks)
        used, expected = self.fullest(peaks), self.planned()
        if self.loop.ranks.first:
            shown = [
                f"rank {rank} {amount(peak.tensors)}" + (f" ({amount(peak.reserved)} reserved)" if self._on_gpu else "")
                for rank, peak in enumerate(peaks[:RANKS_SHOWN])
            ]
            more = f" and {len(peaks) - RANKS_SHOWN} more" if len(peaks) > RANKS_SHOWN else ""
            print(
                f"memory at most: {', '.join(shown)}{more}" + (f"; planned {amount(expected)}" if expected else ""),
                flush=True,
            )
        found = {"peakMemoryGB": used.tensors / 1e9}
        if self._on_gpu:
            found["reservedMemoryGB"] = used.reserved / 1e9
        if expected:
            found["plannedMemoryGB"] = expected / 1e9
        return {name: round(value, 3) for name, value in found.items()}
