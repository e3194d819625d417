"""Checks whether an adapter belongs to the model of a GenerateJob: by its task, its base model and its shapes.

PEFT adds any adapter whose shapes fit, and silently ignores weights whose module the model does not have; the outputs
are then of poor quality, without an error. The base of another job's adapter is recorded and can be compared exactly.
For other adapters the base can only be compared if the adapter names a local folder, because the names that people
write there (a mirror, a quantised copy) are not reliable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import Adapter
from luthier_api.methods import BY_PEFT_TYPE, METHODS
from luthier_api.run import GenerateRun
from luthier_api.tasks import GENERATION_TASKS, TASKS
from luthier_trainer.models import inspect, quantised_base, sources, weight_files
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG, MODEL_CONFIG
from luthier_trainer.workspace.provenance import folder_digest

WEIGHTS = "adapter_model.safetensors"  # the one file that PEFT 0.21 writes and reads
PREFIX = "base_model.model."  # PEFT's prefix of the names in that file
LORA_WEIGHT = re.compile(r"(.+)\.lora_(?:embedding_)?([AB])(?:\.weight)?")
ADDED = re.compile(r"(.+?)\.lora_(?:embedding_)?[ABE](?:\.(weight|bias))?")
LAST = re.compile(r"(.+)\.[^.]+")
# DoRA replaces the norm of a weight, trainable tokens replace single rows of an embedding, and IA3 multiplies.
REPLACED = re.compile(r"(.+?)\.(?:lora_magnitude_vector(?:\.weight)?|token_adapter\..+|ia3_l)")
COPIED = ".base_layer.weight"  # PEFT also saves the base's embeddings if an adapter is on them
SHOWN = 3  # names in a message
# Settings of adapters that cannot be merged, because they act while the model runs.
NOT_MERGED = (
    "alora_invocation_tokens",
    "arrow_config",
    "layer_replication",
)


def check(
    adapter: Path, job: str | None, field: str, run: GenerateRun, model: sources.Located, model_path: Path
) -> None:
    """Check that the adapter in folder `adapter` belongs to `model`.

    `job` is the FineTuneJob that the adapter is the result of, if it is one. `model_path` is the folder of the model
    now; it differs from `model.folder` if the model was downloaded or merged. Raises Failure if the adapter was made
    for another task or model, or cannot be merged.
    """
    path = adapter / ADAPTER_CONFIG
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    check_task(task_of_adapter(config) or config.get("task_type"), run.spec.task, field)
    if job:
        check_base(job, field, run, model)
    elif model.folder == model_path:
        check_named_base(Path(config.get("base_model_name_or_path") or ""), field, model)
    if TASKS[run.spec.task].library == "transformers":
        check_kind(config, field)
        check_weights(adapter, field)
        check_shapes(adapter, field, model_path, model.resolved.source, run.spec.task)


def check_task(trained_for: str | None, task: str, field: str) -> None:
    """Check that an adapter was trained for the kind of model that `task` uses. Raises Failure if not."""
    needed = base_task(task)
    if trained_for and trained_for != needed:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the adapter was trained for {trained_for}, and {task} needs one for {needed}. Name another,"
            " or remove it",
        )


def base_task(task: str) -> str:
    """Return what `task_of_adapter` says of the adapters that suit a task: the first task with models of its class."""
    model = TASKS[task].auto_model
    if model is None:
        return "Stable Diffusion XL"
    return next(name for name, info in TASKS.items() if info.auto_model == model)


def task_of_adapter(config: Mapping[str, Any]) -> str | None:
    """Return the task that an adapter was trained for, from the content of its adapter_config.json.

    Returns None if the configuration does not name a task, or names one that is not in `TASKS`.
    """
    if peft_type := config.get("task_type"):
        return next((name for name, task in TASKS.items() if peft_type == task.peft_task_type), None)
    # What the class is called is not enough: Wav2Vec2ForSequenceClassification classifies audio.
    base = (config.get("auto_mapping") or {}).get("base_model_class")
    return next((name for name, task in TASKS.items() if task.auto_model and base in inspect.classes(name)), None)


def check_kind(config: Mapping[str, Any], field: str) -> None:
    """Check that the adapter can be merged into the weights of the model. Raises Failure if it cannot."""
    check_mergeable(config, field)
    if setting := next((name for name in NOT_MERGED if config.get(name)), None):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the adapter has {setting} ({ADAPTER_CONFIG}), and cannot become part of the model's weights",
        )
    quantised_base.check_adapter(config, field)


def check_mergeable(config: Mapping[str, Any], field: str) -> None:
    """Check that adapters of this kind can be merged. `config`: of PEFT. Raises Failure if they cannot."""
    method = BY_PEFT_TYPE.get(kind := config.get("peft_type") or "")
    if method is not None and method.mergeable:
        return
    reason = method.why["mergeable"] if method else "it is not known how its logits could be kept"
    known = ", ".join(info.title for info in METHODS.values() if info.mergeable and not info.quantization)
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: is a {kind} adapter, which cannot be merged, because {reason}. Load it with PEFT, or use one of:"
        f" {known}",
    )


def check_weights(adapter: Path, field: str) -> None:
    """Check that the adapter's weights exist as safetensors and are finite. Raises Failure if not."""
    from safetensors import safe_open

    if not (adapter / WEIGHTS).is_file():
        there = ", ".join(sorted(path.name for path in adapter.iterdir())[:8])
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {adapter} has no {WEIGHTS} (it has: {there}). Save the adapter with PEFT's save_pretrained",
        )
    with safe_open(adapter / WEIGHTS, "pt") as weights:
        bad = [
            name.removeprefix(PREFIX)
            for name in weights.keys()  # noqa: SIM118
            if not weights.get_tensor(name).float().isfinite().all()
        ]
    if bad:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: weights of the adapter are not finite: {some(bad)}. Choose another version of it",
        )


@dataclass(frozen=True)
class Changes:
    """The weights of a model that an adapter changes, by name."""

    adds: frozenset[str]
    replaces: frozenset[str]
    """Includes weights of which only a part is replaced: rows for single tokens, or the norm (DoRA)."""

    @property
    def all(self) -> frozenset[str]:
        """Return the names of all weights that the adapter changes."""
        return self.adds | self.replaces


def changes(adapter: Path) -> Changes:
    """Return the weights that the adapter in folder `adapter` adds to and replaces, from the names in its file."""
    adds, replaces = set[str](), set[str]()
    for name in names_in(adapter):
        if added := ADDED.fullmatch(name):
            adds.add(f"{added[1]}.{added[2] or 'weight'}")
        elif replaced := REPLACED.fullmatch(name):
            replaces.add(f"{replaced[1]}.weight")
        elif not name.endswith(COPIED):
            replaces.add(name.replace(".base_layer.", "."))
    return Changes(frozenset(adds), frozenset(replaces))


def names_in(adapter: Path) -> dict[str, list[int]]:
    """Return name → shape of the tensors in an adapter's file; the names are without PEFT's prefix."""
    header = weight_files.safetensors_header(adapter / WEIGHTS)
    return {key.removeprefix(PREFIX): tensor["shape"] for key, tensor in header.items() if key != "__metadata__"}


def check_together(folders: Sequence[Path], adapters: Sequence[Adapter], field: str) -> None:
    """Check that each adapter has its full effect beside the others, and at its weight.

    `folders` and `adapters` have the same order. If one adapter replaces a weight, no other adapter may change this
    weight, because only the last of them would have an effect. Raises Failure if two adapters conflict, or if an
    adapter that replaces weights has another weight than 1.
    """
    found = {i: changes(folders[i]) for i, adapter in enumerate(adapters) if adapter.weight != 0}
    for i, own in found.items():
        kind = json.loads((folders[i] / ADAPTER_CONFIG).read_text()).get("peft_type")
        if adapters[i].weight != 1 and kind in BY_PEFT_TYPE and not BY_PEFT_TYPE[kind].weighted:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[{i}].weight: PEFT (0.21) has no weights for adapters of {BY_PEFT_TYPE[kind].title}; set 1",
            )
        # Biases are excluded: `merge.add_adapter` multiplies their change by the weight.
        whole = sorted(name for name in own.replaces if not name.endswith(".bias"))
        if whole and adapters[i].weight != 1:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[{i}].weight: the adapter replaces {some(whole)} instead of adding to it, and what is replaced"
                " has no weight; set 1",
            )
        for j in range(i):
            if j in found and (both := sorted((own.replaces & found[j].all) | (own.all & found[j].replaces))):
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"{field}[{i}]: {some(both)} is replaced by one of this adapter and {field}[{j}], and changed by"
                    " the other as well. Only one of them would have its effect; remove one",
                )


def some(names: Sequence[str]) -> str:
    """Return the first names for a message, and how many others there are."""
    return ", ".join(names[:SHOWN]) + f" and {len(names) - SHOWN} others" * (len(names) > SHOWN)


def check_base(job: str, field: str, run: GenerateRun, model: sources.Located) -> None:
    """Check that the adapter of FineTuneJob `job` was trained on this model.

    Revisions are compared if both are known and of the same kind, otherwise sources. Raises Failure if they differ.
    """
    base, given = sources.record_of(job, run, field).model, model.resolved
    if base.revision and given.revision:
        if base.revision == given.revision:
            return
        if len(base.revision) != len(given.revision):
            return  # a commit on the Hub and the SHA-256 of a folder cannot be compared
    elif base.source == given.source:
        return
    if base.source != given.source:
        merged = f", or leave the adapter out and set model: {{job: {job}}}, which has both"
        can_merge = "model.job" in GENERATION_TASKS[run.spec.task].fields
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: FineTuneJob {job} was trained on {base.source}, and spec.model is {given.source}. Set spec.model"
            f" to the former{merged if can_merge else ''}",
        )
    remedy = f"Set spec.model.revision: {base.revision}" if run.spec.model.id else f"Run {job} again"
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: {given.source} has changed since FineTuneJob {job} was trained on it (then {base.revision}, now"
        f" {given.revision}). {remedy}",
    )


def check_named_base(base: Path, field: str, model: sources.Located) -> None:
    """Check that the base model that an adapter names is the model that it is added to.

    Only a base that is a folder in this pod can be compared. Raises Failure if its content differs.
    """
    if base.is_absolute() and base.is_dir() and folder_digest(base) != model.resolved.revision:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the adapter was trained on {base}, and spec.model is {model.resolved.source}. Set spec.model to"
            " the former",
        )


def check_shapes(adapter: Path, field: str, model_path: Path, name_of_model: str, task: str) -> None:
    """Check that each module that the adapter changes exists in the model for `task`, and has the same shape.

    The modules of the model are built on the meta device, without memory. Raises Failure if one is absent or differs.
    """
    import torch
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(model_path)
    if get_checkpoint_conversion_mapping(config.model_type):
        return  # the names of tensors in the files differ from those of the modules
    if TASKS[task].head and (adapter / MODEL_CONFIG).is_file():
        config.num_labels = AutoConfig.from_pretrained(adapter).num_labels  # those of the head that it brings
    modules = dict(inspect.skeleton(config, task, field).named_modules())
    for name, shape in names_in(adapter).items():
        place = next(
            m[1] for m in (ADDED.fullmatch(name), REPLACED.fullmatch(name), LAST.fullmatch(name)) if m
        ).removesuffix(".base_layer")
        module = modules.get(place)
        if module is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: the adapter does not fit {name_of_model}, which has no module {place}. Name the model it was"
                " trained on",
            )
        if name.endswith(".lora_B.bias") and getattr(module, "bias", None) is None:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: the adapter has a bias for {place}, which has none in {name_of_model}; it cannot be merged",
            )
        match = LORA_WEIGHT.fullmatch(name)
        own = getattr(module, name.rpartition(".")[2], None)
        if match and isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D):
            # A Linear's weight has the shape (outputs, inputs); an Embedding's and a Conv1D's (inputs, outputs).
            inputs, outputs = module.weight.shape[::-1] if isinstance(module, torch.nn.Linear) else module.weight.shape
            # lora_A has the shape (rank, inputs), lora_B (outputs, rank).
            wide, given, what = (inputs, shape[1], "inputs") if match[2] == "A" else (outputs, shape[0], "outputs")
        elif not match and isinstance(own, torch.Tensor) and own.ndim == len(shape):  # a replaced weight, or a copy
            wide, given, what = next(
                ((w, g, "rows or columns") for w, g in zip(own.shape, shape, strict=True) if w != g), (0, 0, "")
            )
        else:
            continue
        if wide != given:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: the adapter does not fit {name_of_model}: {place} has {wide} {what} there, and {given} in"
                " the adapter. Name the model it was trained on",
            )
