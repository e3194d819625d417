"""A mixin for any transformers Trainer that adds what a preemptible, distributed run needs.

Checkpoints are staged, verified and committed; all processes agree on a stop; NaN is neither hidden nor saved; and each
row counts exactly once in an epoch. `resilient(Trainer)` returns the class that trains. The mixin knows of a batch only
what the task answers through `tasks.base.Batches`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import BatchSamplerShard
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.tensor import DTensor
from torch.utils.data import SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME

from luthier_api.exitcodes import ExitCode
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.methods.state import MethodState
from luthier_trainer.models import fsdp
from luthier_trainer.models.inspect import counts
from luthier_trainer.models.saving import name_dtype, write_weights
from luthier_trainer.models.saving import whole as whole_weight
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beating_while_growing
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks.base import Batch, Batches, Drawn
from luthier_trainer.training import checkpoint, finite
from luthier_trainer.training.best import Choice, Evaluation
from luthier_trainer.training.optimizers import Withholding, withholding
from luthier_trainer.training.order import EpochOrder
from luthier_trainer.training.stream import StreamedRows

WITHOUT_WEIGHT = "without_weight"  # key in a batch that does not count in the loss; its value is the original batch

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # at run time `super()` is the Trainer that follows this mixin in the order of base classes


class EvaluationStopped(Exception):
    """Raised on all processes when they have agreed, between two batches without a gradient, to stop."""


def resilient(trainer: type[Trainer]) -> type[Resilient]:
    """Return the class that trains: the mixin before `trainer`, which is transformers' Trainer or a subclass of it."""
    return type(f"Resilient{trainer.__name__}", (Resilient, trainer), {})


class Resilient(Base):
    """The mixin, placed before a Trainer in the order of base classes. `args.output_dir` holds the checkpoints."""

    optimizer: Any
    """Of transformers; None before it is made."""

    def __init__(
        self,
        *,
        batches: Batches,
        ranks: Ranks,
        identity: dict[str, Any],
        keep: int,
        choice: Choice | None,
        checkpoint_bytes: int,
        seconds_before: float,
        rows_a_step: int,
        order: EpochOrder | None = None,
        evaluation_order: list[int] | None = None,
        method_state: MethodState | None = None,
        own_optimizer: Callable[[Any], torch.optim.Optimizer | None],
        drawn: Drawn | None = None,
        begin_epoch: Callable[[int], None] | None = None,
        **kwargs: Any,
    ) -> None:
        """`rows_a_step`: rows of an optimiser step. `order`: in which an epoch reads the rows; None: at random.
        `evaluation_order`: positions of the held-out rows; None: their own order.

        `drawn` draws what is random in a batch, and `begin_epoch` tells the collator of the epoch. `method_state`: what
        the method has for checkpoints and steps, where that is more than PEFT saves. `own_optimizer` makes the
        optimiser for this trainer, or returns None if transformers makes it.
        """
        self._order, self._evaluation_order = order, evaluation_order
        self.is_sharded = fsdp.is_sharded(kwargs["model"])
        """Whether FSDP divides the weights."""
        # transformers 5.23 refuses to save the optimiser of such a model. This class saves and loads the shards itself.
        kwargs["args"].save_only_model = self.is_sharded
        super().__init__(**kwargs)
        self.args.save_only_model = False
        self.remove_callback(PrinterCallback)  # `callbacks.Report` prints one readable line instead
        self.batches, self.ranks, self.identity, self.keep = batches, ranks, identity, keep
        self.rows_a_step = rows_a_step
        self.method_state = method_state
        self._penalty_scale = 0.0
        """By what the method's penalty is multiplied in the next forward pass: it counts once in a step."""
        self._own_optimizer = own_optimizer
        self.drawn: Drawn = drawn or (lambda batch, step: batch)
        self._begin_epoch = begin_epoch or (lambda epoch: None)
        self.choice = choice
        """What is done with evaluations: early stopping, and which weights are delivered; None: nothing."""
        self.checkpoint_bytes = checkpoint_bytes
        """Expected size of the next checkpoint in bytes: first the planned size, then the size of the previous one."""
        self.seconds_before = seconds_before
        """Seconds of training of earlier attempts, up to the checkpoint that this attempt resumes from."""
        self.tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        """Tokens, int64 [], that this process has trained on since the last report (which sums over all processes)."""
        self.rows = 0
        """Rows that this process has trained on since the last report."""
        self.computed_tokens = 0
        """Tokens that this process has computed since the last report, padding included."""
        self.withheld = torch.zeros((), dtype=torch.int64, device=self.args.device)
        """Updates of this attempt, int64 [], that were not applied because their gradients were not finite."""
        self.withheld_in_a_row = torch.zeros((), dtype=torch.int64, device=self.args.device)
        """How many of the latest consecutive updates were not applied, int64 []."""
        self.saved: Path | None = None
        """The newest verified checkpoint."""
        self._proven = False
        """Whether a checkpoint of this attempt has been loaded back."""
        self.save_seconds = 0.0
        self.started = time.monotonic()
        self._folder = Path(self.args.output_dir)
        self._delivered: torch.dtype | None = None
        self._saved_dtype: torch.dtype | None = None
        self._evaluation_stopped = False
        self._mean_rows: float | torch.Tensor | None = None
        """Mean rows per micro-batch of the step, over all processes; None if the loss counts its items itself."""

    def deliver(self, dtype: torch.dtype) -> None:
        """Convert the weights to the dtype in which they are saved. Later evaluations convert inputs to it too.

        With FSDP they are converted when they are saved: its buffers are made for one dtype.
        """
        self._saved_dtype = dtype
        if not self.is_sharded:
            self.model.to(dtype)
            self._delivered = dtype

    @property
    def seconds(self) -> float:
        """Seconds of training up to now, over all attempts."""
        return self.seconds_before + time.monotonic() - self.started

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train. Returns early if all processes agree to stop while a task computes something before the first step."""
        try:
            return super().train(*args, **kwargs)
        except EvaluationStopped:
            return None

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """Return this process's micro-batches of a step, and the number of items in the step over all processes.

        The number of items is None if the loss is not a mean over items. In the last step of an epoch a process may
        have one micro-batch fewer than the others. It still has to take part in their forward and backward passes, so
        it gets a batch that does not count.
        """
        batches = [self.drawn(b, self.state.global_step) for b in itertools.islice(epoch_iterator, num_batches)]
        if len(batches) < num_batches:
            batches.append(self._batch_without_weight())
        items = self._get_num_items_in_batch(batches, device)
        self._mean_rows = self._rows_of_a_mean_batch(batches) if items is None else None
        # transformers divides a loss that is no mean over items by the number of micro-batches.
        self._penalty_scale = 1.0 if items is not None else float(len(batches))
        return batches, items

    def _batch_without_weight(self) -> Batch:
        """A batch of the first row that no count includes and whose loss `compute_loss` multiplies by zero."""
        loader = self.callback_handler.train_dataloader
        # BatchNorm cannot compute statistics from a single row, so the row is repeated.
        rows = [loader.dataset[0]] * min(self.args.per_device_train_batch_size, 2)
        batch: Batch = self.drawn(self._prepare_inputs(loader.collate_fn(rows)), self.state.global_step)
        return self.batches.without_weight(batch) | {WITHOUT_WEIGHT: batch}

    def _rows_of_a_mean_batch(self, batches: list[Batch]) -> float | torch.Tensor:
        """Rows of the step over all processes, divided by the number of micro-batches of all processes.

        All processes have the same number of micro-batches.
        """
        rows = sum(self._rows_in(batch) for batch in batches)
        if self.ranks.count == 1:
            return rows / len(batches)
        # The tensor stays on the device: reading it in each step would make the host wait.
        of_all = self.accelerator.reduce(torch.tensor(float(rows), device=self.args.device), reduction="sum")
        return of_all / (len(batches) * self.ranks.count)

    def _rows_in(self, batch: Batch) -> int:
        return 0 if WITHOUT_WEIGHT in batch else self.batches.rows(batch)

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        loss = self._weighted_loss(model, inputs, *args, **kwargs)
        if self.method_state is None or self.method_state.course is None or not model.training:
            return loss
        scale, self._penalty_scale = self._penalty_scale, 0.0
        return loss + scale * self.method_state.course.penalty() if scale else loss

    def _weighted_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        if WITHOUT_WEIGHT in inputs:
            # The loss of the original batch is finite. With all items ignored, some models compute a mean over zero
            # items, which is NaN, and NaN * 0.0 is NaN.
            return super().compute_loss(model, inputs[WITHOUT_WEIGHT], *args, **kwargs) * 0.0
        if self._mean_rows is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # A trainer that does not count items takes the mean over each micro-batch, then over micro-batches and
        # processes. The last micro-batches of an epoch may have fewer rows, and each of those rows would weigh more.
        weight = self.batches.rows(inputs) / self._mean_rows
        return super().compute_loss(model, inputs, *args, **kwargs) * weight

    def training_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        if WITHOUT_WEIGHT not in inputs:
            self.rows += self.batches.rows(inputs)
            tokens = self.batches.tokens(inputs)
            if tokens is not None:
                self.tokens += tokens  # stays on the device: reading it in each step would make the host wait
            self.computed_tokens += self.batches.computed_tokens(inputs) or 0
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        # In fp16, overflows are expected while the scale of the loss is adjusted. GradScaler and DeepSpeed skip these
        # updates.
        if not self.args.fp16:
            self._withhold_update(norm)
        return norm

    def _withhold_update(self, norm: Any) -> None:
        """Skip the update if its gradients are not finite, because it would make all weights NaN.

        All processes see the same norm. DeepSpeed skips such updates itself. Otherwise this is done as GradScaler does
        it: `found_inf` tells the fused optimizer on the device. If the host read the norm, it would wait for the device
        in each step.
        """
        bad = torch.as_tensor(norm, device=self.args.device).isfinite().logical_not()
        self.withheld += bad
        self.withheld_in_a_row = (self.withheld_in_a_row + 1) * bad
        if self.is_deepspeed_enabled:
            return
        optimizer = self.optimizer.optimizer
        if isinstance(optimizer, Withholding):
            optimizer.withheld = bool(bad)  # the host waits for the device: these optimisers cannot decide it there
        else:
            optimizer.found_inf = bad.float()

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        args = super()._build_accelerator_args(**kwargs)
        for handler in args["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                # Gradients are views of what DDP sends, instead of a second copy of them.
                handler.gradient_as_bucket_view = True
        return args

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        # With DeepSpeed, transformers forgets an optimiser that the trainer was given, and calls this method.
        if self.optimizer is None:
            self.optimizer = self._own_optimizer(self)
        optimizer = super().create_optimizer(*args, **kwargs)
        # DeepSpeed skips updates by itself, and has its own class around the optimizer.
        return optimizer if self.is_deepspeed_enabled else withholding(optimizer)

    def use_averaged_weights(self) -> None:
        """Let a schedule-free optimiser put its averaged weights, which are the result, into the model."""
        self.optimizer.eval()  # of accelerate, which asks the optimiser only if it has such a mode

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # not used, and transformers would count all parameters for each micro-batch to compute it

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            # transformers resets the running sum by subtracting it from itself. NaN - NaN is NaN, so it would stay NaN.
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed from the last step: only the result is missing
            self.control.should_training_stop = True
        if self.control.should_training_stop:  # true if the evaluation before the first step was stopped
            return
        # By default accelerate repeats the first rows of an epoch until all processes have the same number of batches.
        # The plan has counted the steps with those equal numbers. When the rows are read, each one has to come once.
        sampler = kwargs["train_dataloader"].batch_sampler
        if isinstance(sampler, BatchSamplerShard):
            sampler.even_batches = False
        if self._order is not None:
            # transformers 5.23 tells the sampler of several processes nothing when it resumes within an epoch.
            self._order.epoch = kwargs["epoch"]
        self._begin_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if isinstance(self.train_dataset, StreamedRows):
            return SequentialSampler(self.train_dataset)
        return self._order or super()._get_train_sampler(train_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return self._evaluation_order or super()._get_eval_sampler(eval_dataset)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save before evaluating, where transformers logs, evaluates and then saves.

        Otherwise a pod that is stopped during a long evaluation would lose the checkpoint that was due.
        """
        evaluate, self.control.should_evaluate = self.control.should_evaluate, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if not evaluate:
            return
        self.control.should_log = self.control.should_save = False
        self.control.should_evaluate = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.control.should_evaluate = False
        if (self._evaluation_stopped or self._best_step() == self.state.global_step) and not self.is_saved:
            self.control.should_log = self.control.should_save = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    @property
    def is_saved(self) -> bool:
        """Whether the newest checkpoint is of the present step."""
        return self.saved is not None and checkpoint.step_of(self.saved) == self.state.global_step

    def _best_step(self) -> int | None:
        """The step whose weights would be delivered if the training ended now; None if it is the last one anyway."""
        if self.choice is None or not self.choice.load:
            return None
        best = self.choice.best(self.choice.evaluations(self.state.log_history))
        return best.step if best else None

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # `training.main` evaluates after the last step, with the weights in the dtype in which they are delivered. The
        # last weights are compared with the best ones in the dtype of the training, as all others were.
        compared = self.choice is not None and self.choice.load
        if self.state.global_step >= self.state.max_steps and not compared:
            return {}
        try:
            metrics = super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._evaluation_stopped = self.control.should_training_stop = True
            return {}
        if self.choice and self.choice.has_stopped(self.state.log_history):
            self.control.should_training_stop = True
        return metrics

    def load_best(self) -> Evaluation | None:
        """Load the weights of the best evaluation, unless they are the present ones. Return the evaluation.

        Returns None if no evaluation has been made. All processes call this function after the training. A checkpoint
        whose files do not match its manifest is passed over, with a notice, for the next best one.
        """
        assert self.choice is not None
        evaluations = self.choice.evaluations(self.state.log_history)
        best = chosen = self.choice.best(evaluations)
        while chosen is not None and chosen.step != self.state.global_step:
            folder = Path(self.args.output_dir) / f"checkpoint-{chosen.step}"
            broken = checkpoint.verify(folder, self.ranks)[1]
            if not broken:
                self._load_weights(folder)
                break
            evaluations = [evaluation for evaluation in evaluations if evaluation.step != chosen.step]
            chosen = self.choice.best(evaluations)
        if chosen != best and self.ranks.first:
            assert best is not None
            notice(
                f"spec.training.loadBestModel: checkpoint-{best.step} had the best {self.choice.metric},"
                f" {best.value:.6g}, but its files do not match their manifest; the next best one is delivered"
            )
        return chosen

    def _load_weights(self, folder: Path) -> None:
        """Load the weights of a verified checkpoint into the model that has been trained."""
        if self.is_deepspeed_enabled:
            # From its own shards, with the state of the optimiser, which has the weights in fp32. A checkpoint of
            # adapters does not have the frozen weights.
            whole = isinstance(self.model, PreTrainedModel)
            deepspeed_load_checkpoint(self.model_wrapped, str(folder), load_module_strict=whole)
            return
        self._load_from_checkpoint(str(folder))
        self._load_optimizer_and_scheduler(str(folder))  # a schedule-free optimiser holds a part of the weights

    def _prepare_input(self, data: Any) -> Any:
        if self._delivered and isinstance(data, torch.Tensor) and data.is_floating_point():
            data = data.to(self._delivered)  # a convolution with 16-bit weights accepts only pixels of the same dtype
        return super()._prepare_input(data)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.ranks.count > 1:
            # Modules with batch statistics (BatchNorm) have counted the batches of their own process. All processes
            # evaluate with the statistics of rank 0, which are the ones that are saved.
            for module in filter(counts, self.model.modules()):
                for statistics in module.buffers(recurse=False):
                    torch.distributed.broadcast(statistics, 0)
        # A data loader draws a seed for its workers. Restoring the generator afterwards keeps evaluations from changing
        # the random numbers of the training that follows.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load a checkpoint's weights. Raises Failure(TRAINING_ERROR) if weights of the model are missing in it."""
        if self.is_sharded:
            fsdp.load_rows(self.model, self._shards(Path(resume_from_checkpoint))["weights"], resume_from_checkpoint)
            return
        if self.method_state is not None:
            self.method_state.load(Path(resume_from_checkpoint))
            return
        if not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # The weights of some architectures (Swin, Gemma 3, every mixture of experts) have other names in files than in
        # memory. transformers 5.23 saves the names of files, but its own method here matches them with the names in
        # memory, silently keeps the base model's values for weights without a match, and continues.
        saved, loaded = type(self.model).from_pretrained(
            resume_from_checkpoint, dtype=self.model.dtype, output_loading_info=True
        )
        if lost := sorted(loaded["missing_keys"]):
            raise Failure(
                ExitCode.TRAINING_ERROR,
                f"{resume_from_checkpoint}: {len(lost)} weights of the model are not in it, among them {lost[0]}",
            )
        self.model.load_state_dict(saved.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.is_sharded and checkpoint is not None:
            fsdp.load_optimizer(self.optimizer.optimizer, self._shards(Path(checkpoint))["optimizer"])
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        held = {
            "weights": fsdp.own_rows(self.model),
            "optimizer": fsdp.without_wholes(self.optimizer.optimizer.state_dict()),
        }
        torch.save(held, Path(output_dir, checkpoint.SHARDS.format(self.ranks.rank)))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _shards(self, folder: Path) -> dict[str, Any]:
        """What this process has saved to a checkpoint under FSDP: its rows of the weights, and of their optimiser."""
        file = folder / checkpoint.SHARDS.format(self.ranks.rank)
        found: dict[str, Any] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        return found

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, folder, began = self.state.global_step, Path(self.args.output_dir), time.monotonic()
        self.ranks.decide(lambda: checkpoint.make_room(folder, self.checkpoint_bytes))
        self._folder = folder / f"{checkpoint.STAGING}checkpoint-{step}"
        staged = self._folder / f"checkpoint-{step}"
        try:
            with beating_while_growing(self._folder):
                super()._save_checkpoint(model, trial)
        finally:
            self._folder = folder
        if isinstance(self.train_dataset, StreamedRows):
            self.train_dataset.pass_by(step * self.rows_a_step)
            if self.ranks.first:
                self.train_dataset.save(staged)
        self.ranks.wait()
        facts = {
            "step": step,
            "seconds": round(self.seconds, 1),
            "processes": self.ranks.count,
            **checkpoint.facts_of(self.identity),
        }
        described = self.ranks.each(lambda: checkpoint.describe(staged, self.ranks.rank, self.ranks.count))
        self.saved = self.ranks.decide(lambda: checkpoint.commit(staged, folder, described, facts))
        if not self._proven:
            checkpoint.load_back(self.saved, self.ranks)
            self._proven = True
        self.checkpoint_bytes = sum(entry["size"] for of_rank in described for entry in of_rank)
        if self.ranks.first:
            checkpoint.rotate(folder, self.keep, self._best_step())
        self.save_seconds = time.monotonic() - began

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights of a checkpoint (an internal call) or of the result to `output_dir`.

        Raises Failure(DIVERGED) if a weight is not finite.
        """
        finite.check_weights(self)
        if (self.is_deepspeed_enabled or self.is_sharded) and _internal_call:
            # A run resumes from shards, so a checkpoint needs no second copy of the weights. Under ZeRO-3 and FSDP that
            # copy would also have to be gathered in each save. Only the result needs one.
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
            return
        if self.method_state is not None and _internal_call:
            if self.args.should_save:
                self.method_state.save(Path(output_dir or self.args.output_dir))
            return
        if self.is_deepspeed_enabled and isinstance(self.model, PreTrainedModel):
            self._save(output_dir)  # transformers would have all weights on the host of rank 0 before it writes any
            return
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        whole = isinstance(self.model, PreTrainedModel)
        folder, writes = Path(output_dir or self.args.output_dir), self.args.should_save
        if self.is_sharded and not whole:
            fsdp.at_rest(self.model)
            weights = self.model.state_dict(keep_vars=True)
            state_dict = {name: whole_weight(w, writes) for name, w in weights.items() if w.requires_grad}
        if writes or not self.is_sharded:
            super()._save(output_dir, {} if whole else state_dict)
        if whole and (writes or self.is_sharded or is_deepspeed_zero3_enabled()):
            dtype = self._saved_dtype if self.is_sharded else None
            write_weights(self.model, folder, writes, dtype=dtype)
            if writes and dtype is not None:
                name_dtype(folder, dtype)
        if writes:
            # This file is a pickle: nothing reads it, and unpickling a file can execute code.
            Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)
