"""Writes the result folder: model or adapter, tokenizer, metrics.json, and last the manifest that marks it complete.

The files are written to a staging folder, which is then renamed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import safe_open
from transformers import TrainerState

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, PreparedRecord
from luthier_api.workspace import METRICS_FILE, WorkspaceFolder
from luthier_trainer.methods import loftq
from luthier_trainer.methods.initial import Initial
from luthier_trainer.models.quantised_base import LOFTQ
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat, beating_while_growing
from luthier_trainer.runtime.notices import given
from luthier_trainer.tasks.base import Task, TrainingContext
from luthier_trainer.training.checkpoint import check_identity, facts_of
from luthier_trainer.training.finite import changing_weights, nonfinite_names
from luthier_trainer.training.resilience import Resilient
from luthier_trainer.workspace.manifest import fsync, read_manifest, write_manifest
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

STAGING = ".staging-result"
PADDING = "padding_tokens"  # key of a report in the history of the trainer


def finished(workspace: WorkspaceFolder, wanted: dict[str, Any]) -> dict[str, float] | None:
    """Return the metrics of the complete result in `workspace`, or None if there is no complete result.

    `wanted`: the identity of this run. Raises Failure(INVALID_SPEC) if a run with other settings made the result.
    """
    manifest = read_manifest(workspace.result)
    if manifest is None:
        return None
    check_identity(workspace.result, manifest, wanted)
    metrics: dict[str, float] = json.loads((workspace.result / METRICS_FILE).read_text())
    return metrics


def notices(workspace: WorkspaceFolder) -> list[str]:
    """Return the notices of the run that made the complete result, so that an attempt after it repeats them."""
    return [*(read_manifest(workspace.result) or {}).get("notices", [])]


def final_metrics(state: TrainerState, seconds: float, names: Collection[str]) -> dict[str, float]:
    """Return the metrics of a finished run, over all its attempts: the checkpoints carry its history.

    `seconds`: duration of the training. `names`: the task's own metrics besides the losses. Metrics that are not finite
    are left out, because JSON cannot represent them. trainLoss is the mean over the reports with a finite loss.
    paddingShare is the share of the computed tokens that only filled up rows.
    """
    metrics = {"steps": float(state.global_step), "seconds": round(seconds, 1)}
    if state.num_input_tokens_seen:
        metrics["tokens"] = float(state.num_input_tokens_seen)  # rows of images have no tokens
    padding = sum(entry.get(PADDING, 0.0) for entry in state.log_history)
    if state.num_input_tokens_seen:
        metrics["paddingShare"] = round(padding / (padding + state.num_input_tokens_seen), 4)
    reports = [(entry["step"], entry["loss"]) for entry in state.log_history if "loss" in entry]
    steps = [step - before for (step, _), (before, _) in zip(reports, [(0, 0.0), *reports], strict=False)]
    finite = [(n, loss) for n, (_, loss) in zip(steps, reports, strict=True) if math.isfinite(loss)]
    if finite:
        metrics["trainLoss"] = sum(n * loss for n, loss in finite) / sum(n for n, _ in finite)
    if reports:
        metrics["lastLoss"] = reports[-1][1]
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    if evaluations:
        metrics["evalLoss"] = evaluations[-1]["eval_loss"]
        metrics |= {name: evaluations[-1][f"eval_{name}"] for name in names if f"eval_{name}" in evaluations[-1]}
        if evaluations[0]["step"] == 0:
            metrics["evalLossBefore"] = evaluations[0]["eval_loss"]
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def write(
    loop: Resilient,
    task: Task,
    context: TrainingContext,
    run: FineTuneRun,
    prepared: PreparedRecord,
    workspace: WorkspaceFolder,
    metrics: dict[str, float],
    use_cache: bool | None,
    begun: Initial | None,
) -> None:
    """Write the result. All ranks call this function, because sharded weights have to be gathered.

    `use_cache`: the value in the model's configuration before training, which is restored; None if it had none.
    `begun`: what adapters were in the beginning, if the result has to be without it. Raises Failure(DIVERGED) if a
    weight is not finite, and Failure(TRAINING_ERROR) if no weights or empty ones were saved.
    """
    staged = workspace.root / STAGING
    if loop.ranks.first:
        shutil.rmtree(staged, ignore_errors=True)
    loop.ranks.wait()
    if loop.method_state is not None and loop.method_state.course is not None:
        loop.method_state.course.finish()
    if use_cache is not None:
        loop.model.config.use_cache = use_cache
    with beating_while_growing(staged):
        loop.save_model(str(staged))
    loop.ranks.wait()
    if loop.ranks.first:
        if begun is not None:
            begun.write_ordinary(staged)
        _name_base(staged, run, prepared)
        if run.spec.method.init_lora_weights == LOFTQ:
            loftq.write_settings(staged, loop.model)
        task.complete_result(staged, loop.model, context)
        _check_weights(
            staged,
            {name for name, _ in loop.model.named_buffers()} - {name for name, _ in changing_weights(loop.model)},
        )
        (staged / METRICS_FILE).write_text(json.dumps(metrics, indent=1))
        write_manifest(staged, progress=beat, step=loop.state.global_step, notices=given(), **facts_of(loop.identity))
        # What lies there has no manifest: `finished` would have returned its metrics.
        shutil.rmtree(workspace.result, ignore_errors=True)
        staged.rename(workspace.result)
        fsync(workspace.root)
    loop.ranks.wait()


def _name_base(folder: Path, run: FineTuneRun, prepared: PreparedRecord) -> None:
    """Write the base model into the configuration of an adapter, in a form that other programs can resolve.

    This is the Hub's id and commit, or the path of the folder for a model that does not come from the Hub.
    """
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return
    config = json.loads(path.read_text())
    base = {"base_model_name_or_path": str(Path(prepared.model_path).absolute()), "revision": None}
    if run.spec.model.id:
        base = {"base_model_name_or_path": run.spec.model.id, "revision": prepared.model.revision}
    # A program that loads an adapter lets it begin once more, before it replaces what has begun. PEFT's orthogonal way
    # fails on quantised weights.
    begins = {"init_lora_weights": True} if "init_lora_weights" in config else {}
    path.write_text(json.dumps(config | base | begins, indent=2, sort_keys=True))
    # The card that PEFT saves is empty and names the local folder. `publish` writes the real card.
    (folder / "README.md").unlink(missing_ok=True)


def _without_rank(folder: Path) -> list[str]:
    """Return the modules from which AdaLoRA has taken all ranks. Their tensors are empty."""
    path = folder / ADAPTER_CONFIG
    pattern = json.loads(path.read_text()).get("rank_pattern") if path.exists() else None
    # LoRA has ranks there, which are never zero.
    return [
        name.partition(".lora_")[0]
        for name, left in (pattern or {}).items()
        if isinstance(left, list) and not any(left)
    ]


def _check_weights(folder: Path, constants: Collection[str] = ()) -> None:
    """Raise Failure if the files hold empty tensors, which was observed with ZeRO-3, or numbers that are not finite.

    `constants`: names of tensors that training does not change. They may hold minus infinity, for example in a mask.
    """
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as weights:
            names = list(weights.keys())
            without_rank = _without_rank(folder)
            empty = [
                name
                for name in names
                if 0 in weights.get_slice(name).get_shape()
                and not any(f".{module}.lora_" in name for module in without_rank)
            ]
            if empty or not names:
                raise Failure(
                    ExitCode.TRAINING_ERROR,
                    f"{file.name}: {len(empty) or 'all'} tensors were saved empty ({', '.join(empty[:3])})",
                )
            beat()  # each file of a large model takes seconds
            wrong = nonfinite_names((name, weights.get_tensor(name)) for name in names if name not in constants)
        if wrong:
            cause = (
                f"{len(wrong)} of {len(names)} tensors of the result's {file.name}, among them {', '.join(wrong[:3])},"
                " are not finite numbers"
            )
            raise Failure(
                ExitCode.DIVERGED,
                f"spec.training: {cause}. The result was not delivered; lower learningRate, or use precision bf16 or"
                " fp32",
            )
    if not files:
        raise Failure(ExitCode.TRAINING_ERROR, f"no weights were saved in {folder}")
