"""What happens between two steps: stop when the pod has to go, report, count, notice what is wrong.

Each callback is called on every rank at the same step, so collectives are safe here. Order matters: `train` lists them.
Neighbours: `resilience` calls them, `supervisor` writes the stop flag and reads the heartbeat, `telemetry` serves the
figures.
"""

from __future__ import annotations

import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier_api import metrics
from luthier_api.exitcodes import ExitCode
from luthier_api.status import Plan
from luthier_trainer.distributed import strategy
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.runtime.notices import notice
from luthier_trainer.runtime.run_folder import stop_requested
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.training import finite
from luthier_trainer.training.checkpoint import set_aside, step_of
from luthier_trainer.training.resilience import EvaluationStopped, Resilient
from luthier_trainer.training.utilisation import count_weights, operations_per_token, peak

NONFINITE_REPORTS = 3  # one bad batch can spoil a report; a loss that stays NaN does not come back
WITHHELD_UPDATES = 3  # in a row: one bad batch costs its own update, and no more


class Callback(TrainerCallback):
    """Knows its loop. Set after the loop is made, before it runs."""

    loop: Resilient


class Guard(Callback):
    """The strategy is the one asked for, and every weight that should learn gets a gradient in the first step."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._waiting: set[str] = set()
        self._hooks: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        strategy.assert_realised(self.loop, self.plan)
        learning = [(name, p) for name, p in self.loop.model.named_parameters() if p.requires_grad]
        if not learning:
            raise Failure(ExitCode.INVALID_SPEC, "spec.method: no weight of the model would learn")
        # Hooks, because DeepSpeed takes each gradient away as soon as it has it. (LoRA's A gets zeros in step 1: B is
        # zero.)
        self._waiting = {name for name, _ in learning}
        self._hooks = [p.register_hook(lambda _, name=name: self._waiting.discard(name)) for name, p in learning]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._waiting:
            names = sorted(self._waiting)
            raise Failure(
                ExitCode.MISCONFIGURED,
                f"spec.method: {len(names)} of the weights that should learn got no gradient, among them"
                f" {', '.join(names[:3])}. This model does not use them for this task; choose method lora with"
                " targetModules that it uses",
            )


class Stop(Callback):
    """All ranks agree, after each step and each batch of an evaluation, whether to stop.

    SIGTERM reaches pods at different times, and a rank alone can neither save nor leave.
    """

    agreed_step: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.loop.ranks.any(stop_requested()):
            self.agreed_step = state.global_step
            control.should_save = control.should_training_stop = True
            # The held-out rows can wait for the next attempt; the grace period cannot.
            if control.should_evaluate:
                control.should_evaluate = False
                self._say_postponed(state)
        if control.should_save:
            control.should_log = True  # what was not reported before a save is lost to whoever resumes from it

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.loop.ranks.any(stop_requested()):
            self.agreed_step = state.global_step
            self._say_postponed(state)
            raise EvaluationStopped

    def _say_postponed(self, state: TrainerState) -> None:
        if self.loop.ranks.first:
            print(
                f"step {state.global_step}/{state.max_steps}  the pod has to go: the next attempt makes the evaluation"
                " of this step",
                flush=True,
            )


class Heartbeat(Callback):
    """Touches the file that the supervisor watches for hangs."""

    def _beat(self, *_: Any, **__: Any) -> None:
        beat()

    on_train_begin = on_step_end = on_prediction_step = on_save = _beat


class Report(Callback):
    """Loss, pace and checkpoints as metrics and as one line a report. Ends a run whose losses or gradients are no
    longer finite numbers.
    """

    def __init__(self, telemetry: Telemetry) -> None:
        self.telemetry = telemetry
        self._nonfinite = 0
        self._withheld = 0  # updates, as far as reported
        self._applied = 0  # updates, in this attempt
        self._step_began = self._reported = 0.0
        self._first_step_began: float | None = None
        self._first_step = 0
        self._operations = 0  # floating-point, for a token

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._reported = time.monotonic()
        self._first_step = state.global_step
        self.telemetry.set(metrics.TRAIN_STEP, state.global_step)
        self.telemetry.set(metrics.TRAIN_MAX_STEPS, state.max_steps)
        self._operations = operations_per_token(*count_weights(self.loop.model.parameters()))
        self.telemetry.add(metrics.TRAIN_TOKENS, state.num_input_tokens_seen)
        self.telemetry.add(metrics.TRAIN_NONFINITE, 0)  # served before the first, so that a rate over it begins at zero
        if self.loop.ranks.first:
            self._found(self.loop.saved, Path(args.output_dir))
        self.loop.started = time.monotonic()

    def _found(self, saved: Path | None, folder: Path) -> None:
        """What this attempt begins with: it may be less than the attempt before had, where a checkpoint is broken."""
        self.telemetry.set(metrics.CHECKPOINT_STEP, step_of(saved) if saved else 0)
        if saved:
            self.telemetry.set(metrics.CHECKPOINT_TIME, saved.stat().st_mtime)
        self.telemetry.set(metrics.CHECKPOINTS_BROKEN, len(set_aside(folder)))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step_began = time.monotonic()
        if self._first_step_began is None:
            self._first_step_began = self._step_began  # the evaluation before the first step is no part of the pace

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        self._applied += not self.loop.accelerator.optimizer_step_was_skipped
        self.telemetry.set(metrics.TRAIN_STEP, state.global_step)
        self.telemetry.set(metrics.TRAIN_EPOCH, state.epoch or 0.0)
        self.telemetry.observe(metrics.TRAIN_STEP_SECONDS, now - self._step_began)
        self.telemetry.set(metrics.TRAIN_ETA_SECONDS, self._eta(state, now))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            self.telemetry.set(metrics.EVAL_LOSS, logs["eval_loss"])
            self._say(state, f"held-out loss {logs['eval_loss']:.4f}")
            self._reported = time.monotonic()  # an evaluation is no part of the training's pace
            self._watch_evaluation(state, logs["eval_loss"])
        if "loss" not in logs:
            return
        now = time.monotonic()
        tokens = self.loop.ranks.total(float(self.loop.tokens.item()))
        self.loop.tokens.zero_()
        rows, self.loop.rows = self.loop.ranks.total(float(self.loop.rows)), 0
        state.num_input_tokens_seen += int(tokens)
        seconds = max(now - self._reported, 1e-9)
        self._reported = now
        for metric, value in (
            (metrics.TRAIN_LOSS, logs["loss"]),
            (metrics.TRAIN_LEARNING_RATE, logs["learning_rate"]),
            (metrics.TRAIN_SAMPLES_PER_SECOND, rows / seconds),
            (metrics.TRAIN_GRAD_NORM, logs.get("grad_norm") or 0.0),
        ):
            self.telemetry.set(metric, value)
        self.telemetry.add(metrics.TRAIN_SAMPLES, rows)
        self.telemetry.add(metrics.TRAIN_TOKENS, tokens)
        if tokens:  # images have none
            self.telemetry.set(metrics.TRAIN_TOKENS_PER_SECOND, tokens / seconds)
        if args.device.type == "cuda":
            self._gpu(tokens / seconds, args)
        pace = f"{tokens / seconds:,.0f} tokens/s" if tokens else f"{rows / seconds:,.1f} rows/s"
        self._say(
            state,
            f"loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}  {pace}"
            f"  {timedelta(seconds=round(self._eta(state, now)))} left",
        )
        self._watch(state, control, logs["loss"])

    def _gpu(self, pace: float, args: TrainingArguments) -> None:
        self.telemetry.set(metrics.GPU_MEMORY_ALLOCATED, torch.cuda.memory_allocated())
        self.telemetry.set(metrics.GPU_MEMORY_RESERVED, torch.cuda.memory_reserved())
        self.telemetry.set(metrics.GPU_MEMORY_PEAK, torch.cuda.max_memory_allocated())
        if pace and (most := peak(torch.cuda.get_device_name())):
            self.telemetry.set(metrics.TRAIN_MFU, pace * self._operations / (most * args.world_size))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.loop.saved is None:
            return
        self.telemetry.set(metrics.CHECKPOINT_STEP, step_of(self.loop.saved))
        self.telemetry.set(metrics.CHECKPOINT_TIME, time.time())
        self.telemetry.set(metrics.CHECKPOINT_SECONDS, self.loop.save_seconds)
        self._say(state, f"saved {self.loop.saved.name} in {self.loop.save_seconds:.1f} s")
        self._reported = time.monotonic()

    def _watch_evaluation(self, state: TrainerState, loss: float) -> None:
        """Raise Failure(DIVERGED), on all ranks, for a held-out loss that is not finite: no such model is delivered."""
        if math.isfinite(loss):
            return
        if state.global_step == 0:
            raise Failure(
                ExitCode.DIVERGED,
                f"spec.model: the held-out loss is {loss} before the first step. Look for broken weights of the model"
                " and for broken held-out rows; with precision fp16, try bf16 or fp32",
            )
        cause = f"spec.training.learningRate: the held-out loss is {loss} at step {state.global_step}"
        raise finite.diverged(cause, self.loop.saved, state.global_step)

    def _watch(self, state: TrainerState, control: TrainerControl, loss: float) -> None:
        """Raise Failure(DIVERGED), on all ranks, where the run does not come back."""
        in_a_row, withheld = int(self.loop.withheld_in_a_row.item()), int(self.loop.withheld.item())
        if withheld > self._withheld:
            self._say(state, f"{withheld - self._withheld} updates withheld: their gradients were not finite")
        self._withheld = withheld
        if in_a_row >= WITHHELD_UPDATES:
            cause = (
                f"spec.training.learningRate: the gradients of {in_a_row} steps in a row, up to step"
                f" {state.global_step}, were not finite"
            )
            raise finite.diverged(f"{cause} (the loss is {loss})", self.loop.saved, state.global_step)
        if math.isfinite(loss):
            self._nonfinite = 0
            return
        self._nonfinite += 1
        self.telemetry.add(metrics.TRAIN_NONFINITE)
        control.should_save = False  # never replace a good checkpoint by one that has gone wrong
        if self._nonfinite >= NONFINITE_REPORTS:
            cause = (
                f"spec.training.learningRate: the loss is {loss} at step {state.global_step}, {self._nonfinite} reports"
                " in a row"
            )
            raise finite.diverged(cause, self.loop.saved, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say which updates are missing. Raises Failure(DIVERGED) where a whole training has none."""
        done, withheld = state.global_step - self._first_step, int(self.loop.withheld.item())
        whole = self._first_step == 0 and state.global_step >= state.max_steps
        if whole and done == max(withheld, done - self._applied):
            cause = (
                f"spec.training.learningRate: the gradients of all {done} steps up to step {state.global_step} were not"
                " finite"
            )
            raise finite.diverged(cause, self.loop.saved, state.global_step)
        if withheld and self.loop.ranks.first:
            notice(
                f"spec.dataset: {withheld} of {done} updates were not applied, because their gradients were not finite"
                " (NaN or infinite). The weights are those without them. Look for broken rows; lower learningRate if"
                " there are many"
            )

    def _eta(self, state: TrainerState, now: float) -> float:
        done = state.global_step - self._first_step
        if not done or self._first_step_began is None:
            return 0.0
        return (now - self._first_step_began) / done * (state.max_steps - state.global_step)

    def _say(self, state: TrainerState, text: str) -> None:
        if self.loop.ranks.first:
            print(f"step {state.global_step}/{state.max_steps}  {text}", flush=True)
