"""The training process of a FineTuneJob's run phase, one on each device. `main` holds the whole course of a training.

`process` starts it and converts its exceptions into exit codes. This process reads what `prepare` has resolved, encoded
and planned; it does none of that again.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import DatasetDict, load_from_disk
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging as transformers_logging

from luthier_api.exitcodes import ExitCode
from luthier_api.methods import METHODS
from luthier_api.run import FineTuneRun, GenerateRun, PreparedRecord, step_timeout_of
from luthier_api.status import Plan
from luthier_api.tasks import TASKS, TRAINING_TASKS
from luthier_api.termination import TerminationMessage
from luthier_api.training import Training
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data.lengths import longest_first
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.distributed.strategy import FSDP, assert_started, count, uses_deepspeed
from luthier_trainer.methods import apply as methods
from luthier_trainer.methods import initial
from luthier_trainer.methods.state import MethodState
from luthier_trainer.methods.table import FAMILIES
from luthier_trainer.methods.trainable import HALF, source_dtype
from luthier_trainer.models import fsdp, inspect, varlen
from luthier_trainer.models.quantised_base import check_rows
from luthier_trainer.models.zero3 import keep_used_conversions, whole_ties
from luthier_trainer.runtime.devices import fitting_attention, use_tf32
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.runtime.run_folder import global_rank
from luthier_trainer.runtime.telemetry import Telemetry
from luthier_trainer.tasks.base import TrainingContext
from luthier_trainer.tasks.table import task_of
from luthier_trainer.tracking.callback import Tracking, tracking
from luthier_trainer.training import checkpoint, optimizers, order, result
from luthier_trainer.training.arguments import training_arguments
from luthier_trainer.training.best import Choice
from luthier_trainer.training.callbacks import FirstSave, Guard, Heartbeat, MethodSteps, Report, Stop
from luthier_trainer.training.canary import Canary
from luthier_trainer.training.compiling import compile_blocks
from luthier_trainer.training.resilience import EvaluationStopped, Resilient, resilient
from luthier_trainer.training.stream import streamed_rows
from luthier_trainer.training.utilisation import count_weights
from luthier_trainer.workspace import course, provenance, space
from luthier_trainer.workspace.manifest import read_manifest
from luthier_trainer.workspace.plan import count_steps
from luthier_trainer.workspace.prepared import read_prepared

# The parts that PEFT adds to the names of weights
PEFT_PARTS = re.compile(r"^base_model\.model\.|modules_to_save\.default\.|base_layer\.|lora_[AB]\.default\.")
SHOWN = 3  # weights in a line of the log


def main(run: FineTuneRun | GenerateRun, observers: Sequence[Any] = ()) -> TerminationMessage:
    """Train as the run config and `prepared.json` say, from the newest usable checkpoint if there is one.

    `observers`: callbacks that are called after those of the training; each gets the trainer as its `loop`.

    Returns the termination message of this attempt: COMPLETED with the metrics, or PREEMPTED if all ranks agreed to
    stop. Raises Failure if the devices are not what the plan needs.
    """
    assert isinstance(run, FineTuneRun), "train is a verb of FineTuneJob"
    workspace, spec = WorkspaceFolder(Path(run.workspace)), run.spec
    prepared, task = read_prepared(run), task_of(spec)
    identity = checkpoint.identity(run, prepared)
    if (metrics := result.finished(workspace, identity)) is not None:
        for text in result.notices(workspace):
            notice(text)
        return ended(ExitCode.COMPLETED, metrics=metrics, step=int(metrics["steps"]))
    assert_started(prepared.plan)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # Deprecation warnings of the libraries do not help a user who reads the log.
    warnings.filterwarnings("ignore", category=FutureWarning)

    # Constructing TrainingArguments opens the process group. Then all ranks agree on the checkpoint to start from.
    data: DatasetDict = load_from_disk(prepared.dataset_path)
    workspace.checkpoints.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(
        task,
        spec,
        prepared.plan,
        workspace.checkpoints,
        evaluates="eval" in data,
        step_timeout=step_timeout_of(run),
    )
    ranks = Ranks(arguments.ddp_timeout)
    resume = checkpoint.newest(workspace.checkpoints, identity, ranks)
    ranks.decide(
        lambda: space.check_room(
            spec, prepared.plan, workspace.checkpoints, held=len(checkpoint.checkpoints(workspace.checkpoints))
        )
    )
    # The evaluation of a step follows its save. The previous attempt may have ended between the two, and even a
    # finished evaluation is not recorded in the checkpoint of its own step.
    processor = task.read_processor(workspace.prepared / "processor", "spec.model")
    rows: Any
    if prepared.stream is None:
        rows = data["train"]
    else:
        ranks.decide(lambda: begin_stream(prepared, workspace.stream))
        rows = streamed_rows(task, spec, prepared.stream, processor, workspace.stream, ranks.rank, resume)
    choice = Choice.of(spec.training, TRAINING_TASKS[spec.task])
    arguments.eval_on_start = "eval" in data and (
        resume is None
        or owes_evaluation(resume, spec.training, prepared.plan, task.epoch_rows(spec, len(rows), prepared.group_rows))
    )
    before = (read_manifest(resume) or {}) if resume else {}

    deepspeed, sharded = uses_deepspeed(prepared.plan.strategy), prepared.plan.strategy == FSDP
    # Seeded before new weights are drawn, so that heads and adapters start with the same values on all ranks and in all
    # attempts.
    set_seed(spec.training.seed)
    precision = "fp32"
    if arguments.bf16:
        precision = "bf16"
    elif arguments.fp16:
        precision = "fp16"
    tf32 = use_tf32(spec.training.tf32, precision, arguments.device.type == "cpu")
    implementation, why_not = fitting_attention(prepared.plan.attention, precision, arguments.device.type == "cpu")
    if why_not and ranks.first:
        notice(f"spec.training.attention: {implementation} instead of {prepared.plan.attention}, because {why_not}")
    plan = prepared.plan.model_copy(update={"attention": implementation})
    if spec.training.parameter_precision == "bf16" and precision != "bf16":
        raise Failure(
            ExitCode.MISCONFIGURED,
            f"spec.training.parameterPrecision: bf16, and these GPUs compute in {precision}; choose GPUs from Ampere"
            " on, or fp32",
        )
    if sharded and precision == "fp16":
        raise Failure(
            ExitCode.MISCONFIGURED,
            "spec.strategy: fsdp computes in bf16 or fp32, and these GPUs have no bf16; set training.precision: fp32,"
            " choose GPUs from Ampere on, or strategy zero3",
        )
    weights = methods.weights_options(
        spec.method,
        precision,
        deepspeed,
        arguments.device,
        spec.model.quantization,
        spec.training.parameter_precision,
        shards=prepared.plan.world_size if sharded else 1,
    )
    if TASKS[spec.task].library == "transformers":
        weights |= inspect.whole_layers(inspect.read_config(Path(prepared.model_path), inspect.MODEL))
    if implementation is not None:
        varlen.register()
        weights["attn_implementation"] = implementation
    context = TrainingContext(
        spec=spec,
        model_path=Path(prepared.model_path),
        processor=processor,
        labels=prepared.dataset.labels,
        class_weights=prepared.class_weights,
        other_models=[Path(path) for path in prepared.other_model_paths],
        weights=weights,
        whole_logits=prepared.whole_logits is not None,
        folder=workspace.prepared / "kept",
    )
    with whole_ties(), fsdp.in_shards() if sharded else nullcontext():
        loaded = task.load_model(context)
    if spec.model.quantization is None and hasattr(loaded.model, "hf_device_map"):
        # transformers' Trainer takes a model with such a map for one of several devices, and moves nothing to its GPU,
        # not even adapters that are added later.
        del loaded.model.hf_device_map
    if arguments.device.type == "cpu":
        check_rows(loaded.model, "spec.model", "Use method.type: lora without model.quantization, or a GPU")
    keep_used_conversions(loaded.model)
    use_cache = getattr(loaded.model.config, "use_cache", None)
    model = methods.with_method(
        loaded.model,
        spec.method,
        TASKS[spec.task].peft_task_type,
        loaded.new_modules,
        deepspeed,
        prepared.new_tokens,
        prepared.plan.steps or 1,
        prepared.piece_parts,
    )
    family = FAMILIES.get(spec.method.type)
    if family is not None:
        family.begin(model, spec.method, processor)
    begun = initial.begin(
        model,
        spec.method,
        arguments.device,
        workspace.prepared / "initial-adapter",
        ranks,
        checkpoint.digest(identity),
        Path(prepared.model_path),
    )
    unused = freeze(model, loaded.unused_parameters)
    method_state = MethodState(family, model, spec.method) if family is not None and family.saves_all else None

    if sharded:
        fsdp.fully_sharded(model, half=precision == "bf16" and not METHODS[spec.method.type].adapter)
    compiled = compile_blocks(model) if spec.training.torch_compile else 0

    telemetry, stop = Telemetry(), Stop()
    report = Report(telemetry, run.gpu.peak_flops if run.gpu else None, task.reported, prepared.compute)
    canary = Canary(telemetry, plan, spec.resources.processes)
    callbacks = [Guard(plan, unused), MethodSteps(), Heartbeat(), report, canary, FirstSave(), stop]
    resumed = checkpoint.step_of(resume) if resume else None
    trackers = tracking(run, prepared, resumed) if ranks.first else Tracking([])
    setup = task.trainer(context, loaded.model)
    loop = resilient(setup.trainer)(
        model=model,
        args=arguments,
        processing_class=processor,
        data_collator=setup.collator,
        train_dataset=rows,
        eval_dataset=data.get("eval"),
        callbacks=[*callbacks, trackers, *observers],
        **setup.options,
        drawn=setup.drawn,
        begin_epoch=setup.begin_epoch,
        batches=task,
        ranks=ranks,
        identity=identity,
        keep=spec.training.keep_checkpoints,
        choice=choice,
        checkpoint_bytes=prepared.plan.checkpoint_bytes or 0,
        seconds_before=before.get("seconds", 0.0),
        rows_a_step=spec.training.batch_size,
        order=order.of_epochs(task, spec, prepared.plan, rows) if prepared.stream is None else None,
        evaluation_order=(
            longest_first(data["eval"]["length"][:]) if spec.training.group_by_length and "eval" in data else None
        ),
        method_state=method_state,
        own_optimizer=lambda trainer: optimizers.own(trainer, spec.training, spec.task),
    )
    for callback in (*callbacks, *observers):
        callback.loop = loop
    if ranks.first:
        telemetry.serve(run.metrics_port)
        if loaded.unused_parameters:
            print(
                f"spec.model: {len(loaded.unused_parameters)} of its weights have no part in this task and stay as they"
                f" are: {', '.join(sorted(loaded.unused_parameters)[:SHOWN])} ...",
                flush=True,
            )
        print(opening(loop, spec.training, prepared, precision, setup.loss, resume, tf32, compiled), flush=True)

    loop.saved = resume
    with trackers, closing(rows) if prepared.stream else nullcontext():
        loop.train(resume_from_checkpoint=str(resume) if resume else None)
        if stop.agreed_step is not None:
            return stopped(loop, stop.agreed_step)

        seconds = loop.seconds
        chosen = deliver_best(loop)
        loop.use_averaged_weights()
        if not METHODS[spec.method.type].adapter and not deepspeed:
            # The result is saved in the dtype of the original files. The last evaluation uses the weights in that
            # dtype.
            loop.deliver(source_type(prepared.model_path))
        try:
            if "eval" in data:
                loop.evaluate()
        except EvaluationStopped:
            return stopped(loop, loop.state.global_step)
        metrics = result.final_metrics(loop.state, seconds, task.metric_names(spec)) | chosen
        metrics |= task.training_metrics(loop.state.log_history) | canary.final()
        if ranks.first:
            for text in task.training_notices(loop.state.log_history):
                notice(text)
            if prepared.stream:
                rows.tell()
        result.write(loop, task, context, run, prepared, workspace, metrics, use_cache, begun)
        if ranks.first:
            print("done: " + "  ".join(f"{name} {value:g}" for name, value in metrics.items()), flush=True)
        trackers.complete = True
        return ended(ExitCode.COMPLETED, metrics=metrics, step=loop.state.global_step)


def begin_stream(prepared: PreparedRecord, folder: Path) -> None:
    """Remove what an earlier attempt was downloading. Raises Failure if files have changed since `prepare`."""
    shutil.rmtree(folder, ignore_errors=True)
    provenance.refuse_changes(origin for origin in prepared.origins if not origin.whole)


def owes_evaluation(resume: Path, training: Training, plan: Plan, rows: int) -> bool:
    """Return whether an evaluation was due at the step of checkpoint `resume` but is missing from its history.

    `rows`: rows to train on.
    """
    step, processes = checkpoint.step_of(resume), plan.world_size
    per_epoch = count_steps(rows, processes, plan.micro_batch_size or 1, plan.accumulation_steps or 1, epochs=1)
    if not course.evaluation_is_due(training, step, per_epoch, plan.steps or 0):
        return False
    history = json.loads((resume / TRAINER_STATE_NAME).read_text())["log_history"]
    return not any("eval_loss" in entry and entry["step"] == step for entry in history)


def deliver_best(loop: Resilient) -> dict[str, float]:
    """Load the weights to deliver if the evaluations choose them, and say so. Return what the metrics have of it."""
    if loop.choice is None:
        return {}
    history = loop.state.log_history
    if loop.choice.has_stopped(history) and loop.ranks.first:
        notice(loop.choice.why_stopped(history, loop.state.max_steps))
    if not loop.choice.load:
        return {}
    best = loop.load_best()
    if best is None:
        return {}
    if loop.ranks.first:
        notice(loop.choice.why_chosen(best, history))
    return {"bestStep": float(best.step)}


def stopped(loop: Resilient, agreed: int) -> TerminationMessage:
    """Return the termination message of a run that all ranks have agreed to stop after `agreed` steps."""
    if agreed == 0:
        return ended(ExitCode.PREEMPTED, "stopped before the first step: there was nothing to save yet")
    step = checkpoint.step_of(loop.saved) if loop.saved else None
    return ended(ExitCode.PREEMPTED, f"stopped after step {agreed}", step=step, saved=step == agreed)


def freeze(model: Any, unused: set[str]) -> int:
    """Exclude the parameters named in `unused`, and the adapter weights beside them, from training.

    They would get no gradient, because the task does not use them. Return how many numbers would have learnt.
    """
    found = [weight for name, weight in model.named_parameters() if PEFT_PARTS.sub("", name) in unused]
    numbers = count(found)
    for weight in found:
        weight.requires_grad_(False)
    return numbers


def ended(code: ExitCode, message: str = "", **facts: Any) -> TerminationMessage:
    """Return the termination message of this rank. `facts`: further fields of the message."""
    return TerminationMessage(phase="run", code=code, reason=code.reason, message=message, rank=global_rank(), **facts)


def source_type(model_path: str) -> torch.dtype:
    """Return the dtype of the weights in the folder of a model; float32 for any type other than the 16-bit ones."""
    name = source_dtype(Path(model_path))
    return getattr(torch, name) if name in HALF else torch.float32


def opening(
    loop: Resilient,
    training: Training,
    prepared: PreparedRecord,
    precision: str,
    loss: str,
    resume: Path | None,
    tf32: bool,
    compiled: int,
) -> str:
    """Return the line of the log that describes the training: model, precision, batch sizes, steps, starting point.

    `loss`: how it is computed; empty if there is only one way. `compiled`: blocks of the model that are.
    """
    learning, weights = count_weights(loop.model.parameters())
    plan = prepared.plan
    attention = getattr(loop.model.config, "_attn_implementation", None)
    return (
        f"training {learning:,} of {weights:,} weights of {prepared.model.source}, {precision}"
        f"{', TF32' if tf32 else ''}"
        f"{f', {compiled} blocks compiled' if compiled else ''}"
        f"{', weights in bf16' if training.parameter_precision == 'bf16' else ''}, "
        f"{f'attention {attention}, ' if attention else ''}{plan.world_size} ×"
        f" {plan.micro_batch_size} rows × {plan.accumulation_steps or 1} accumulated, {plan.steps} steps"
        f"{optimizers.replaced_by(plan.strategy)}, "
        + (f"{loss}, " if loss else "")
        + (f"resuming from {resume.name}" if resume else "from the beginning")
    )
