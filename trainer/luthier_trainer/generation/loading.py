"""Loads a model of transformers for a task, with its adapters merged into it and the head that one of them brings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.tasks import TASKS
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.methods import quantization
from luthier_trainer.models import inspect
from luthier_trainer.models.adapters import names_in
from luthier_trainer.models.heads import heads_of
from luthier_trainer.models.merge import add_adapters, outputs_of
from luthier_trainer.models.quantised_base import check_rows
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.models.weight_check import some
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import MODEL_CONFIG

HEAD_SETTINGS = ("problem_type",)
"""What the configuration beside an adapter says of its head, beside the labels."""


def load_with_adapters(spec: GenerateJobSpec, path: Path, adapters: Sequence[Path], hardware: Hardware) -> Any:
    """Return the model in `path` for the task of the job, on its device, in its precision, without dropout.

    Adapters are merged in fp32, and the result is rounded once. `model.quantization` quantises linear layers while they
    are loaded; the API allows no adapters beside it. Raises Failure if model and adapters do not fit, or if a weight
    would be initialised randomly.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    used = [folder for folder, adapter in zip(adapters, spec.adapters, strict=True) if adapter.weight != 0]
    options = head_options(used) | quantised_options(spec, path, hardware)
    model, report = inspect.auto_class(spec.task).from_pretrained(
        path,
        dtype=torch.float32 if used else hardware.dtype,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
        **OWN_WEIGHTS,
    )
    unused = {*TASKS[spec.task].unused}
    mismatched = {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    brought = {name for folder in used for name in names_in(folder)}
    lost = sorted(name for name in {*report["missing_keys"], *mismatched} - brought if not unused & {*name.split(".")})
    if lost:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.model: {path} holds no weights for {some(lost)} of a {type(model).__name__}; choose a model that was"
            f" trained for {spec.task}",
        )
    if spec.model.quantization:
        if hardware.device == "cpu":
            check_rows(model, "spec.model", "Remove model.quantization, or use a GPU")
        quantised: PreTrainedModel = model.eval()
        return quantised
    merged: PreTrainedModel = add_adapters(model, adapters, [a.weight for a in spec.adapters], "spec.adapters")
    return merged.to(torch.device(hardware.device), hardware.dtype).eval()


def quantised_options(spec: GenerateJobSpec, path: Path, hardware: Hardware) -> dict[str, Any]:
    """Return the options of `from_pretrained` for `model.quantization`; none without it.

    Heads stay as they are, as in a training: they are small, and decide what is answered.
    """
    if not spec.model.quantization:
        return {}
    settings = quantization.settings_for(spec.model.quantization.type, hardware.dtype)
    if TASKS[spec.task].head:
        skeleton = inspect.skeleton(inspect.read_config(path, "spec.model"), spec.task, "spec.model")
        settings.llm_int8_skip_modules = heads_of(skeleton, spec.task)
    return {"quantization_config": settings, "device_map": {"": torch.device(hardware.device)}}


def head_options(adapters: Sequence[Path]) -> dict[str, Any]:
    """Return the options of `from_pretrained` for the head that one of the adapters brings; none without one."""
    for folder in reversed(adapters):
        if labels := outputs_of(folder):
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            beside = json.loads((folder / MODEL_CONFIG).read_text())
            return {
                "id2label": dict(enumerate(labels)),
                "label2id": {label: i for i, label in enumerate(labels)},
                "num_labels": config.num_labels,
                "ignore_mismatched_sizes": True,
                **{name: beside[name] for name in HEAD_SETTINGS if name in beside},
            }
    return {}
