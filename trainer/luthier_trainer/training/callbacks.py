"""Callbacks that run between two steps: stop the run before its pod is deleted, report metrics, detect errors.

The trainer of `resilience` calls them, each on every rank at the same step, so they may use collective operations.
Their order matters; `training.main` lists them. The supervisor writes the stop flag and reads the heartbeat file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from luthier_api import metrics
from luthier_api.exitcodes import ExitCode
from luthier_api.gpus import peak_flops
from luthier_api.run import Compute
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
from luthier_trainer.training.result import PADDING
from luthier_trainer.workspace.flops import per_unit

NONFINITE_REPORTS = 3  # one bad batch can make one report NaN; a loss that stays NaN does not recover
FIRST_SAVE = 0.05  # of all steps
LEFT_OUT = 5  # first steps, which compile, allocate and fill caches: they say nothing about the pace of the others
WITHHELD_UPDATES = 3  # in a row; a single bad batch only costs its own update


class Callback(TrainerCallback):
    """A callback with access to its trainer. `training.main` makes the trainer, and sets `loop` before training."""

    loop: Resilient


class Guard(Callback):
    """Checks that the requested strategy is in use and every trainable weight gets a gradient in the first step."""

    def __init__(self, plan: Plan, unused: int = 0) -> None:
        """`unused`: numbers of the model that do not learn, because the task does not use them."""
        self.plan, self._unused = plan, unused
        self._waiting: set[str] = set()
        self._hooks: list[Any] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Check the strategy and watch the gradients of the trainable weights. Raises Failure if there are none."""
        strategy.assert_realised(self.loop, self.plan, self._unused)
        learning = [(name, p) for name, p in self.loop.model.named_parameters() if p.requires_grad]
        if not learning:
            raise Failure(ExitCode.INVALID_SPEC, "spec.method: no weight of the model would learn")
        # Hooks see each gradient. After the step it would be too late: DeepSpeed frees a gradient as soon as it has
        # used it. (The A matrices of LoRA get gradients of zero in step 1, because the B matrices are zero.)
        self._waiting = {name for name, _ in learning}
        # FSDP computes with other tensors than those that learn, which only get the sum.
        self._hooks = [
            (p.register_post_accumulate_grad_hook if isinstance(p, DTensor) else p.register_hook)(
                lambda _, name=name: self._waiting.discard(name)
            )
            for name, p in learning
        ]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Raise Failure if a trainable weight got no gradient in the first step."""
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


class MethodSteps(Callback):
    """Tells the method of each update that was applied, while the gradients are there."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        method = self.loop.method_state
        if method is None or method.course is None:
            return
        skipped = self.loop.accelerator.optimizer_step_was_skipped or bool(self.loop.withheld_in_a_row.item())
        if not skipped:
            method.course.after_update(state.global_step + 1)


class Stop(Callback):
    """Makes all ranks agree, after each step and each batch of an evaluation, whether to stop.

    SIGTERM reaches the pods at different times, and one rank alone can neither save a checkpoint nor leave the group.
    """

    agreed_step: int | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.loop.ranks.any(stop_requested()):
            self.agreed_step = state.global_step
            control.should_save = control.should_training_stop = True
            # The next attempt can do the evaluation. The checkpoint has to be saved within the pod's grace period.
            if control.should_evaluate:
                control.should_evaluate = False
                self._say_postponed(state)
        if control.should_save:
            # Losses and token counts that are not logged before a save are lost to the run that resumes from it.
            control.should_log = True

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do not evaluate on the way out, and do not save the step again that `on_step_end` has saved."""
        if self.agreed_step is not None:
            control.should_evaluate = False
        if self.loop.is_saved:
            control.should_save = False
        control.should_log = control.should_log or control.should_save

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Raise EvaluationStopped on all ranks as soon as one of them has to stop."""
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


class FirstSave(Callback):
    """Saves a first checkpoint before `FIRST_SAVE` of the training, so that a save that fails is no late surprise.

    Not in a short training, which has lost little if it fails at its end.
    """

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.loop.saved is None and state.global_step == int(FIRST_SAVE * state.max_steps):
            control.should_save = True


class Heartbeat(Callback):
    """Writes the file that the supervisor watches to detect a hang."""

    def _beat(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        beat(state.global_step)

    on_train_begin = on_step_end = on_prediction_step = on_save = _beat


class Report(Callback):
    """Reports loss, speed and checkpoints, as metrics and as one line of the log for each report.

    It ends a run as DIVERGED if its losses or gradients stay NaN or infinite.
    """

    def __init__(
        self,
        telemetry: Telemetry,
        peak_flops: float | None = None,
        reported: Mapping[str, str] | None = None,
        compute: Compute | None = None,
    ) -> None:
        """`peak_flops`: of one GPU, as the administrator has it; from a table of devices where that is None.

        `compute`: what the operations of a token, or of an image, are computed from; None if that is not known.

        `reported`: name in the log → how it is called where it is printed beside the loss.
        """
        self.telemetry, self._most, self._reported_too = telemetry, peak_flops, reported or {}
        self._nonfinite = 0
        self._withheld = 0  # withheld updates that were already reported
        self._applied = 0  # updates applied in this attempt
        self._step_began = self._reported = 0.0
        self._first_step_began: float | None = None
        self._settled: tuple[int, float] | None = None  # (step, when it ended), after LEFT_OUT steps of this attempt
        self._first_step = 0
        self._unit = compute.unit if compute else None
        self._flops = per_unit(compute, recomputed=False).model if compute else 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._reported = time.monotonic()
        self._first_step = state.global_step
        self.telemetry.set(metrics.TRAIN_STEP, state.global_step)
        self.telemetry.set(metrics.TRAIN_MAX_STEPS, state.max_steps)
        self.telemetry.add(metrics.TRAIN_TOKENS, state.num_input_tokens_seen)
        # Exported from the start, so that Prometheus' rate() sees the first increase.
        self.telemetry.add(metrics.TRAIN_NONFINITE, 0)
        if self.loop.ranks.first:
            self._found(self.loop.saved, Path(args.output_dir))
        self.loop.started = time.monotonic()

    def _found(self, saved: Path | None, folder: Path) -> None:
        """Report the checkpoint that this attempt starts from, and the number of broken ones.

        Its step may be lower than the previous attempt reported, if that attempt's newest checkpoint is broken.
        """
        self.telemetry.set(metrics.CHECKPOINT_STEP, step_of(saved) if saved else 0)
        if saved:
            self.telemetry.set(metrics.CHECKPOINT_TIME, saved.stat().st_mtime)
        self.telemetry.set(metrics.CHECKPOINTS_BROKEN, len(set_aside(folder)))

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._step_began = time.monotonic()
        if self._first_step_began is None:
            self._first_step_began = self._step_began  # excludes the evaluation before the first step from the ETA

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        now = time.monotonic()
        self._applied += not self.loop.accelerator.optimizer_step_was_skipped
        self.telemetry.set(metrics.TRAIN_STEP, state.global_step)
        self.telemetry.set(metrics.TRAIN_EPOCH, state.epoch or 0.0)
        self.telemetry.observe(metrics.TRAIN_STEP_SECONDS, now - self._step_began)
        if state.global_step - self._first_step == LEFT_OUT:
            self._settled = (state.global_step, now)
        left = self._eta(state, now)
        self.telemetry.set(metrics.TRAIN_ETA_SECONDS, left)
        if args.device.type == "cuda":
            self.telemetry.set(metrics.TRAIN_GPU_HOURS, (self.loop.seconds + left) * args.world_size / 3600)

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
            self._reported = time.monotonic()  # the time of an evaluation does not count in the speed of training
            self._watch_evaluation(state, logs["eval_loss"])
        if "loss" not in logs:
            return
        now = time.monotonic()
        each = self.loop.ranks.gather([self.loop.tokens.item(), self.loop.rows, self.loop.computed_tokens])
        tokens, rows, computed = (sum(values) for values in zip(*each, strict=True))
        self.loop.tokens.zero_()
        self.loop.rows = self.loop.computed_tokens = 0
        padding = max(computed - tokens, 0.0)
        state.num_input_tokens_seen += int(tokens)
        if computed:
            state.log_history[-1][PADDING] = padding  # the checkpoint keeps it for the attempts that resume from it
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
        self.telemetry.add(metrics.TRAIN_PADDING, padding)
        if tokens:  # rows of images have no tokens
            self.telemetry.set(metrics.TRAIN_TOKENS_PER_SECOND, tokens / seconds)
        if args.device.type == "cuda":
            self._utilisation((rows if self._unit == "row" else tokens) / seconds, args)
        pace = f"{tokens / seconds:,.0f} tokens/s" if tokens else f"{rows / seconds:,.1f} rows/s"
        if padding:
            pace += f", {padding / computed:.0%} padding"
        shown = {title: logs.get(name) for name, title in self._reported_too.items()}
        beside = "".join(f"  {title} {value:.4g}" for title, value in shown.items() if value is not None)
        self._say(
            state,
            f"loss {logs['loss']:.4f}{beside}  lr {logs['learning_rate']:.2e}  {pace}"
            f"  {timedelta(seconds=round(self._eta(state, now)))} left",
        )
        self._watch(state, control, logs["loss"])

    def _utilisation(self, pace: float, args: TrainingArguments) -> None:
        """`pace`: tokens, or images, per second over all processes."""
        most = self._most or peak_flops(torch.cuda.get_device_name())
        if pace and most and self._flops:
            self.telemetry.set(metrics.TRAIN_MFU, pace * self._flops / (most * args.world_size))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.loop.saved is None:
            return
        self.telemetry.set(metrics.CHECKPOINT_STEP, step_of(self.loop.saved))
        self.telemetry.set(metrics.CHECKPOINT_TIME, time.time())
        self.telemetry.set(metrics.CHECKPOINT_SECONDS, self.loop.save_seconds)
        self._say(state, f"saved {self.loop.saved.name} in {self.loop.save_seconds:.1f} s")
        self._reported = time.monotonic()

    def _watch_evaluation(self, state: TrainerState, loss: float) -> None:
        """Raise Failure(DIVERGED), on all ranks, if the held-out loss is not finite: such a model is not delivered."""
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
        """Raise Failure(DIVERGED), on all ranks, if several losses or gradients in a row were not finite."""
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
        control.should_save = False  # do not replace a good checkpoint with one made after the loss became NaN
        if self._nonfinite >= NONFINITE_REPORTS:
            cause = (
                f"spec.training.learningRate: the loss is {loss} at step {state.global_step}, {self._nonfinite} reports"
                " in a row"
            )
            raise finite.diverged(cause, self.loop.saved, state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Give notice of withheld updates. Raises Failure(DIVERGED) if no update of the whole training was applied."""
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
        """Seconds left at the pace of this attempt, without its first steps as soon as there are others."""
        step, began = self._first_step, self._first_step_began
        if self._settled and state.global_step > self._settled[0]:
            step, began = self._settled
        done = state.global_step - step
        if not done or began is None:
            return 0.0
        return (now - began) / done * (state.max_steps - state.global_step)

    def _say(self, state: TrainerState, text: str) -> None:
        if self.loop.ranks.first:
            print(f"step {state.global_step}/{state.max_steps}  {text}", flush=True)
