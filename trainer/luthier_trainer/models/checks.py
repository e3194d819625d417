"""Checks of a job against its model: task, length, sharding, recomputed activations, stored quantisation.

All of them read the configuration only, and raise Failure with the path of the field.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.tasks import TASKS
from luthier_trainer.models.inspect import MODEL, auto_class, counts, max_positions, skeleton
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

PIPELINES = ("StableDiffusionXLPipeline",)
# transformers 5.23, by changing the last of six tokens: these see it from earlier positions, and have no `is_decoder`
# that tells ...
SEE_AHEAD = {"prophetnet", "xlm", "xlnet"}
# ... and these have an `is_decoder` that is false, never read it, and look back only.
NEVER_SEE_AHEAD = {"gpt_neox", "gpt_neox_japanese"}


def check_task(config: PreTrainedConfig, task: str, field: str) -> None:
    """Whether the architecture can do `task`, and was not made for another one. Raises Failure."""
    if type(config) not in auto_class(task)._model_mapping:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: architecture {config.model_type} cannot do {task}; choose another model or task",
        )
    made_for = (getattr(config, "architectures", None) or [""])[0]
    if TASKS[task].labels:
        return
    if made_for.endswith("ForSequenceClassification"):
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: the model is a classifier ({made_for}) and has no head for {task}"
        )
    check_looks_back(skeleton(config, task, field), field)


def check_looks_back(model: PreTrainedModel, field: str) -> None:
    """Whether no position of a causal language model sees the tokens after it. One that does learns to copy what it
    should predict: its loss falls on any text, and it can generate none. Raises Failure.
    """
    kind, is_decoder = model.config.model_type, getattr(model.config, "is_decoder", None)
    if kind in SEE_AHEAD or (is_decoder is False and kind not in NEVER_SEE_AHEAD):
        flag = " (its configuration has is_decoder: false)" if is_decoder is False else ""
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {kind} reads a text from both ends{flag}, so it would see the very tokens that it has to"
            " predict; choose a model that reads forward, such as llama or gpt2",
        )


def check_length(config: PreTrainedConfig, max_length: int, field: str) -> None:
    """Check `training.maxLength` against the positions that the model has. Raises Failure."""
    limit = max_positions(config)
    if limit is not None and max_length > limit:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {max_length} tokens do not fit: the model has {limit} positions (max_position_embeddings); set"
            " it to at most that",
        )


def check_new_tokens(config: PreTrainedConfig, new_tokens: int, field: str) -> None:
    """Whether a prompt of one token and `new_tokens` more fit the model. Raises Failure."""
    limit = max_positions(config)
    if limit is not None and new_tokens >= limit:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {new_tokens} tokens leave no room for a prompt: the model has {limit} positions"
            " (max_position_embeddings); set it below that",
        )


def check_sharding(config: PreTrainedConfig, task: str, field: str) -> None:
    """Whether ZeRO-3 can spread the model. Raises Failure."""
    if any(counts(module) for module in skeleton(config, task, MODEL).modules()):
        # ResNet's own initialisation, for one, meets weights that are not whole (transformers 5.23).
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {config.model_type} keeps statistics of its batches, which ZeRO-3 does not spread; use ddp or"
            " zero2 for such a model",
        )


def cannot_recompute(config: PreTrainedConfig, task: str) -> str | None:
    """Why the model cannot drop its activations and compute them again, if so. Raises Failure when no model can be
    built.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    model = skeleton(config, task, MODEL)
    if not model.supports_gradient_checkpointing:
        return f"{config.model_type} cannot recompute its activations"
    if any(
        counts(inner) for m in model.modules() if isinstance(m, GradientCheckpointingLayer) for inner in m.modules()
    ):
        return f"{config.model_type} keeps statistics of its batches, and would count each twice"
    try:
        model.activation_checkpointing_enable()
    except Exception as error:  # some classes say that they can, and have no layers that do (transformers 5.23)
        return f"{config.model_type} cannot recompute its activations ({' '.join(str(error).split())[:200]})"
    return None


def check_quantisation(config: PreTrainedConfig, allowed: Collection[str], field: str) -> None:
    """Whether the weights are in types that the job's work is known to be right with; `allowed` are transformers' names
    of methods. Raises Failure.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation and (method := dict(quantisation).get("quant_method")) not in allowed:
        beside = f" or one quantised with {' or '.join(sorted(allowed))}" if allowed else ""
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: its weights are quantised ({method}), which this job cannot use; choose the model as it was"
            f" before{beside}",
        )


def check_stored_type(config: PreTrainedConfig, wanted: str, field: str) -> None:
    """Whether weights that are stored as bitsandbytes quantised them are in the type that the job asks for:
    transformers would load them as they are. Raises Failure.
    """
    stored = dict(getattr(config, "quantization_config", None) or {})
    if not stored:
        return
    kind = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "fp4")  # bitsandbytes' default
    if kind != wanted:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: its weights are quantised already, in {kind}, and the job asks for {wanted}; set method.type:"
            f" lora and model.quantization.type: {kind}, or choose the model as it was before",
        )


def check_pipeline(folder: Path, field: str) -> None:
    """Whether `folder` is a diffusers pipeline that text-to-image runs. Raises Failure if it is not."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: text-to-image needs a diffusers pipeline, but there is no model_index.json",
        )
    kind = json.loads(index.read_text()).get("_class_name")
    if kind not in PIPELINES:
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: {kind} is not supported; text-to-image runs {', '.join(PIPELINES)}"
        )
