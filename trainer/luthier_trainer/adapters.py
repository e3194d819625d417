"""Whether an adapter belongs to the model of a GenerateJob: by its task, by the base it was trained on, by its shapes.

PEFT adds any adapter whose shapes fit, and leaves out silently what the model has no place for; the texts are then merely bad. What a
job has recorded of its base is certain; of other adapters only a base that lies here can be compared, because the names that people
give (a mirror, a quantised copy) say little. Neighbour: `preparegeneration`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from luthier_api.exitcodes import ExitCode
from luthier_api.run import GenerateRun
from luthier_trainer import modelfacts, sources
from luthier_trainer.ending import Failure
from luthier_trainer.origins import folder_digest
from luthier_trainer.taskfacts import task_of_adapter

NEEDS = {"text-generation": "causal-lm", "text-to-image": "Stable Diffusion XL"}
LORA_WEIGHT = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


def check(adapter: Path, job: str | None, field: str, run: GenerateRun, model: sources.Located, model_path: Path) -> None:
    """Raise Failure when the adapter in folder `adapter`, the result of FineTuneJob `job` if it is one, belongs to another model.

    `model_path`: where `model` lies now; another folder than it was found in when it was downloaded or merged.
    """
    path = adapter / sources.ADAPTER_CONFIG
    config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    check_task(task_of_adapter(config) or config.get("task_type"), run.spec.task, field)
    if job:
        check_base(job, field, run, model)
    elif model.folder == model_path:
        check_named_base(Path(config.get("base_model_name_or_path") or ""), field, model)
    if run.spec.task == "text-generation":
        check_shapes(adapter, field, model_path, model.resolved.source)


def check_task(trained_for: str | None, task: str, field: str) -> None:
    if trained_for and trained_for != NEEDS[task]:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the adapter was trained for {trained_for}, and {task} needs one for {NEEDS[task]}. Name another, or remove it",
        )


def check_base(job: str, field: str, run: GenerateRun, model: sources.Located) -> None:
    base, given = sources.record_of(job, run, field).model, model.resolved
    if base.revision and given.revision:
        if base.revision == given.revision:
            return
        if len(base.revision) != len(given.revision):
            return  # a commit on the Hub and a SHA-256 say nothing about each other
    elif base.source == given.source:
        return
    if base.source != given.source:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: FineTuneJob {job} was trained on {base.source}, and spec.model is {given.source}. Set spec.model to the former, or leave the"
            f" adapter out and set model: {{job: {job}}}, which has both",
        )
    remedy = f"Set spec.model.revision: {base.revision}" if run.spec.model.id else f"Run {job} again"
    raise Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: {given.source} has changed since FineTuneJob {job} was trained on it (then {base.revision}, now {given.revision}). {remedy}",
    )


def check_named_base(base: Path, field: str, model: sources.Located) -> None:
    if base.is_absolute() and base.is_dir() and folder_digest(base) != model.resolved.revision:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the adapter was trained on {base}, and spec.model is {model.resolved.source}. Set spec.model to the former",
        )


def check_shapes(adapter: Path, field: str, model_path: Path, name: str) -> None:
    """Whether each module that the adapter adds to is in the model, and as wide as it thinks."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(model_path)
    if get_checkpoint_conversion_mapping(config.model_type):
        return  # names in files are not those of modules
    with torch.device("meta"):
        modules = dict(AutoModelForCausalLM.from_config(config).named_modules())
    for file in sorted(adapter.glob("adapter_model*.safetensors")):
        for key, tensor in modelfacts.safetensors_header(file).items():
            if not (match := LORA_WEIGHT.fullmatch(key)):
                continue
            place, side = match.groups()
            module = modules.get(place)
            if module is None:
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"{field}: the adapter does not fit {name}, which has no module {place}. Name the model it was trained on",
                )
            if not isinstance(module, torch.nn.Linear | Conv1D):
                continue
            outputs, inputs = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            wide, found, what = (inputs, tensor["shape"][1], "inputs") if side == "A" else (outputs, tensor["shape"][0], "outputs")
            if wide != found:
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"{field}: the adapter does not fit {name}: {place} has {wide} {what} there, and {found} in the adapter. Name the model it was"
                    " trained on",
                )
