"""The result folder: model or adapter, tokenizer, metrics.json, and last the manifest that makes it complete. Staged,
then moved.
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
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat, beating_while_growing
from luthier_trainer.tasks.base import Task, TrainingContext
from luthier_trainer.training.checkpoint import check_identity, facts_of
from luthier_trainer.training.finite import changing_weights, nonfinite_names
from luthier_trainer.training.resilience import Resilient
from luthier_trainer.workspace.manifest import fsync, read_manifest, write_manifest
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG

STAGING = ".staging-result"


def finished(workspace: WorkspaceFolder, wanted: dict[str, Any]) -> dict[str, float] | None:
    """The metrics of a complete result of this very run, or None. Raises Failure(INVALID_SPEC) when it is another
    run's.
    """
    manifest = read_manifest(workspace.result)
    if manifest is None:
        return None
    check_identity(workspace.result, manifest, wanted)
    metrics: dict[str, float] = json.loads((workspace.result / METRICS_FILE).read_text())
    return metrics


def final_metrics(state: TrainerState, seconds: float, names: Collection[str]) -> dict[str, float]:
    """The metrics of a run that has ended, over all its attempts: its history came along with the checkpoints. `names`:
    those of the task beside the losses.

    Only finite ones: JSON knows no others. trainLoss leaves out the reports that were none, as the training outlived
    them.
    """
    metrics = {"steps": float(state.global_step), "seconds": round(seconds, 1)}
    if state.num_input_tokens_seen:
        metrics["tokens"] = float(state.num_input_tokens_seen)  # images have none
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
) -> None:
    """Called by all ranks: sharded weights are gathered. `use_cache` is what the model's configuration said before
    training; None where it says nothing.
    """
    staged = workspace.root / STAGING
    if loop.ranks.first:
        shutil.rmtree(staged, ignore_errors=True)
    loop.ranks.wait()
    if use_cache is not None:
        loop.model.config.use_cache = use_cache
    with beating_while_growing(staged):
        loop.save_model(str(staged))
    loop.ranks.wait()
    if loop.ranks.first:
        _name_base(staged, run, prepared)
        task.complete_result(staged, loop.model, context)
        _check_weights(
            staged,
            {name for name, _ in loop.model.named_buffers()} - {name for name, _ in changing_weights(loop.model)},
        )
        (staged / METRICS_FILE).write_text(json.dumps(metrics, indent=1))
        write_manifest(staged, progress=beat, step=loop.state.global_step, **facts_of(loop.identity))
        shutil.rmtree(workspace.result, ignore_errors=True)  # without a manifest, or we would not be here
        staged.rename(workspace.result)
        fsync(workspace.root)
    loop.ranks.wait()


def _name_base(folder: Path, run: FineTuneRun, prepared: PreparedRecord) -> None:
    """An adapter names its base as others can find it: the Hub's id and commit, else the folder it was loaded from."""
    path = folder / ADAPTER_CONFIG
    if not path.exists():
        return
    config = json.loads(path.read_text())
    base = {"base_model_name_or_path": str(Path(prepared.model_path).absolute()), "revision": None}
    if run.spec.model.id:
        base = {"base_model_name_or_path": run.spec.model.id, "revision": prepared.model.revision}
    path.write_text(json.dumps(config | base, indent=2, sort_keys=True))
    # PEFT's empty card names the local folder; `publish` writes the real one
    (folder / "README.md").unlink(missing_ok=True)


def _check_weights(folder: Path, constants: Collection[str] = ()) -> None:
    """Raise Failure where the files hold empty tensors, as ZeRO-3 has been seen to save, or numbers that are not
    finite.

    `constants` are names of tensors that no training changes: a mask may be minus infinity.
    """
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as weights:
            names = list(weights.keys())
            empty = [name for name in names if 0 in weights.get_slice(name).get_shape()]
            if empty or not names:
                raise Failure(
                    ExitCode.TRAINING_ERROR,
                    f"{file.name}: {len(empty) or 'all'} tensors were saved empty ({', '.join(empty[:3])})",
                )
            beat()  # of large models, each file takes seconds
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
