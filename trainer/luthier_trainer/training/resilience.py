"""A mixin that makes any transformers Trainer survivable and exact: checkpoints are staged, verified and committed, all
processes agree on a stop, NaN is neither hidden nor saved, and each row counts once an epoch.

`resilient(Trainer)` is the class that runs. What a batch holds only its task knows: `tasks.base.Batches` is all that is
asked of it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.data_loader import BatchSamplerShard
from transformers import PreTrainedModel, PrinterCallback, Trainer
from transformers.trainer import TRAINING_ARGS_NAME

from luthier_api.exitcodes import ExitCode
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.models.inspect import counts
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beating_while_growing
from luthier_trainer.tasks.base import Batch, Batches
from luthier_trainer.training import checkpoint, finite

WITHOUT_WEIGHT = "without_weight"  # key of a batch that counts nothing: the batch as it was before

if TYPE_CHECKING:
    from transformers import Trainer as Base
else:
    Base = object  # a mixin: the Trainer that it calls comes after it in the order of base classes


class EvaluationStopped(Exception):
    """All processes have agreed, between two batches of an evaluation, to stop."""


def resilient(trainer: type[Trainer]) -> type[Resilient]:
    """The class of a run whose task trains with `trainer`, which is transformers' Trainer or a subclass of it."""
    return type(f"Resilient{trainer.__name__}", (Resilient, trainer), {})


class Resilient(Base):
    """Stands before a Trainer in the order of base classes. `args.output_dir` is the folder of the checkpoints."""

    def __init__(
        self,
        *,
        batches: Batches,
        ranks: Ranks,
        identity: dict[str, Any],
        keep: int,
        checkpoint_bytes: int,
        seconds_before: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.remove_callback(PrinterCallback)  # `callbacks.Report` prints one readable line instead
        self.batches, self.ranks, self.identity, self.keep = batches, ranks, identity, keep
        self.checkpoint_bytes = checkpoint_bytes
        """Expected size of the next checkpoint: as planned, then as the previous one was."""
        self.seconds_before = seconds_before
        """Seconds of training that earlier attempts have put into the checkpoint."""
        self.tokens = torch.zeros((), dtype=torch.int64, device=self.args.device)
        """Tokens that this process has trained on since they were last counted over all processes."""
        self.rows = 0
        """Rows, likewise."""
        self.withheld = torch.zeros((), dtype=torch.int64, device=self.args.device)
        """Updates that were not applied because their gradients were not finite, since the beginning of this attempt.
        """
        self.withheld_in_a_row = torch.zeros((), dtype=torch.int64, device=self.args.device)
        """Of those, the ones up to the newest update."""
        self.saved: Path | None = None
        """The newest verified checkpoint."""
        self.save_seconds = 0.0
        self.started = time.monotonic()
        self._folder = Path(self.args.output_dir)
        self._delivered: torch.dtype | None = None
        self._evaluation_stopped = False
        self._mean_rows: float | torch.Tensor | None = None
        """Rows of the step's mean micro-batch, over all processes; None where the loss counts its items itself."""

    def deliver(self, dtype: torch.dtype) -> None:
        """Turn the weights into the type that they are saved in; what is evaluated from here on is given in it too."""
        self.model.to(dtype)
        self._delivered = dtype

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """This process's micro-batches of a step, and the number of items in those of all processes where the loss is
        a mean over items.

        In the last step of an epoch a process may have one micro-batch less than others. It still has to take part in
        their forward and backward passes, so it gets a batch that counts nothing.
        """
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if len(batches) < num_batches:
            batches.append(self._batch_without_weight())
        items = self._get_num_items_in_batch(batches, device)
        self._mean_rows = self._rows_of_a_mean_batch(batches) if items is None else None
        return batches, items

    def _batch_without_weight(self) -> Batch:
        """The first row, as a batch that the counts leave out and whose loss `compute_loss` multiplies by zero."""
        loader = self.callback_handler.train_dataloader
        # BatchNorm has no statistics of a single row.
        rows = [loader.dataset[0]] * min(self.args.per_device_train_batch_size, 2)
        batch: Batch = self._prepare_inputs(loader.collate_fn(rows))
        return self.batches.without_weight(batch) | {WITHOUT_WEIGHT: batch}

    def _rows_of_a_mean_batch(self, batches: list[Batch]) -> float | torch.Tensor:
        """Rows of the step, over all processes, divided by its micro-batches: those of each process are as many."""
        rows = sum(self._rows_in(batch) for batch in batches)
        if self.ranks.count == 1:
            return rows / len(batches)
        # Stays on the device: reading it each step would make the host wait.
        of_all = self.accelerator.reduce(torch.tensor(float(rows), device=self.args.device), reduction="sum")
        return of_all / (len(batches) * self.ranks.count)

    def _rows_in(self, batch: Batch) -> int:
        return 0 if WITHOUT_WEIGHT in batch else self.batches.rows(batch)

    def compute_loss(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        if WITHOUT_WEIGHT in inputs:
            # The whole batch's loss is finite; that of a batch whose items are left out is a mean over nothing in some
            # models.
            return super().compute_loss(model, inputs[WITHOUT_WEIGHT], *args, **kwargs) * 0.0
        if self._mean_rows is None or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        # A trainer that counts no items takes the mean over each micro-batch, then over micro-batches and processes.
        # The last ones of an epoch may have fewer rows, whose weight would be larger than that of the others.
        weight = self.batches.rows(inputs) / self._mean_rows
        return super().compute_loss(model, inputs, *args, **kwargs) * weight

    def training_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        if WITHOUT_WEIGHT not in inputs:
            self.rows += self.batches.rows(inputs)
            tokens = self.batches.tokens(inputs)
            if tokens is not None:
                self.tokens += tokens  # stays on the device: reading it each step would make the host wait
        return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        # There, overflows are how the loss finds its scale; GradScaler and DeepSpeed skip such updates
        if not self.args.fp16:
            self._withhold_update(norm)
        return norm

    def _withhold_update(self, norm: Any) -> None:
        """Do not apply an update whose gradients are not finite: it would make all weights NaN. All processes see the
        same norm.

        DeepSpeed does so by itself. Elsewhere it is done as GradScaler does it, by telling the fused optimizer on the
        device: a host that looked at the norm would wait for the device at each step.
        """
        bad = torch.as_tensor(norm, device=self.args.device).isfinite().logical_not()
        self.withheld += bad
        self.withheld_in_a_row = (self.withheld_in_a_row + 1) * bad
        if not self.is_deepspeed_enabled:
            optimizer = self.optimizer.optimizer
            assert optimizer._step_supports_amp_scaling, f"{type(optimizer).__name__} is not fused"
            optimizer.found_inf = bad.float()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # nobody reads them, and counting all parameters each micro-batch costs more than it tells

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            # transformers subtracts the reported sum from itself, and NaN - NaN would be NaN for ever
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def _run_epoch(self, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # resumed from the last step: only the result was missing
            self.control.should_training_stop = True
        if self.control.should_training_stop:  # so it is when the evaluation before the first step was broken off
            return
        # The plan counts steps with as many batches on each process. Here the rows come: accelerate would fill up with
        # the epoch's first.
        sampler = kwargs["train_dataloader"].batch_sampler
        if isinstance(sampler, BatchSamplerShard):
            sampler.even_batches = False
        super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """transformers' order is: log, evaluate, save. A pod that has to go during a long evaluation would lose what
        was due to be saved.
        """
        evaluate, self.control.should_evaluate = self.control.should_evaluate, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if not evaluate:
            return
        self.control.should_log = self.control.should_save = False
        self.control.should_evaluate = True
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.control.should_evaluate = False
        saved = self.saved is not None and checkpoint.step_of(self.saved) == self.state.global_step
        if self._evaluation_stopped and not saved:
            self.control.should_log = self.control.should_save = True
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        # `train` evaluates what the last step made, as it is delivered
        if self.state.global_step >= self.state.max_steps:
            return {}
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._evaluation_stopped = self.control.should_training_stop = True
            return {}

    def _prepare_input(self, data: Any) -> Any:
        if self._delivered and isinstance(data, torch.Tensor) and data.is_floating_point():
            data = data.to(self._delivered)  # pixels: a convolution of 16 bits takes no others
        return super()._prepare_input(data)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.ranks.count > 1:
            # Each process has counted its own batches, where a model does; the first one's statistics are those that
            # are saved.
            for module in filter(counts, self.model.modules()):
                for statistics in module.buffers(recurse=False):
                    torch.distributed.broadcast(statistics, 0)
        # A data loader draws a number for its workers. What is drawn in an evaluation must not change what is drawn in
        # the training after it.
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not isinstance(self.model, PreTrainedModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Some architectures (Swin, Gemma 3, every mixture of experts) have other names in files than in memory.
        # transformers 5.23 saves the former, and here would match them with the latter, leave what has none as the base
        # model had it, and go on.
        saved, loaded = type(self.model).from_pretrained(
            resume_from_checkpoint, dtype=self.model.dtype, output_loading_info=True
        )
        if lost := sorted(loaded["missing_keys"]):
            raise Failure(
                ExitCode.TRAINING_ERROR,
                f"{resume_from_checkpoint}: {len(lost)} weights of the model are not in it, among them {lost[0]}",
            )
        self.model.load_state_dict(saved.state_dict())

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
        self.ranks.wait()
        facts = {
            "step": step,
            "seconds": round(self.seconds, 1),
            "processes": self.ranks.count,
            **checkpoint.facts_of(self.identity),
        }
        described = self.ranks.each(lambda: checkpoint.describe(staged, self.ranks.rank, self.ranks.count))
        self.saved = self.ranks.decide(lambda: checkpoint.commit(staged, folder, described, facts))
        self.checkpoint_bytes = sum(entry["size"] for of_rank in described for entry in of_rank)
        if self.ranks.first:
            checkpoint.rotate(folder, self.keep)
        self.save_seconds = time.monotonic() - began

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Of a checkpoint (an internal call) or of the result. Raises Failure(DIVERGED) where a weight is not
        finite.
        """
        finite.check_weights(self)
        if self.is_deepspeed_enabled and _internal_call:
            # A checkpoint. DeepSpeed resumes from its own shards, and nobody reads a copy of all weights beside them:
            # under ZeRO-3 it would have to be gathered, and would be a part of each save. Only the result needs one.
            Path(output_dir or self.args.output_dir).mkdir(parents=True, exist_ok=True)
            return
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            # A pickle: nobody needs it, and loading it would run what it says.
            Path(output_dir or self.args.output_dir, TRAINING_ARGS_NAME).unlink(missing_ok=True)
