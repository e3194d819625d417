"""Checks of a job against its model: task, length, sharding, recomputed activations, stored quantisation.

All of them read only the configuration, and raise Failure with the path of the field.
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

    from luthier_api.methods import QuantizationType

XL = ("StableDiffusionXLPipeline",)
PIPELINES = (*XL, "StableDiffusionPipeline")
REFINERS = ("StableDiffusionXLImg2ImgPipeline",)
FLOWS = ("StableDiffusion3Pipeline", "FluxPipeline")  # transformers, which learn a flow from noise to images
TEXT_TO_IMAGE = (*PIPELINES, *FLOWS)
# Measured with transformers 5.23 by changing the last of six tokens: the outputs of earlier positions change, and
# `is_decoder` does not tell.
SEE_AHEAD = {"prophetnet", "xlm", "xlnet"}
# These have `is_decoder: false`, but never read it, and attend only to earlier tokens.
NEVER_SEE_AHEAD = {"gpt_neox", "gpt_neox_japanese"}


def check_task(config: PreTrainedConfig, task: str, field: str) -> None:
    """Check that the architecture can do `task`, and that the model was not made for another one.

    Raises Failure if the architecture has no model class for the task, or if a classifier is used for generation.
    """
    if type(config) not in auto_class(task)._model_mapping:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: architecture {config.model_type} cannot do {task}; choose another model or task",
        )
    made_for = (getattr(config, "architectures", None) or [""])[0]
    if TASKS[task].head:
        return
    if made_for.endswith("ForSequenceClassification"):
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: the model is a classifier ({made_for}) and has no head for {task}"
        )
    if TASKS[task].auto_model == "CausalLM":
        check_looks_back(skeleton(config, task, field), field)


def check_looks_back(model: PreTrainedModel, field: str) -> None:
    """Check that no position of a causal language model attends to later tokens.

    A model that does learns to copy the token that it should predict: its loss falls on any text, but it cannot
    generate text. Raises Failure for such a model.
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
    """Check `training.maxLength` against the positions that the model has. Raises Failure if it is larger."""
    limit = max_positions(config)
    if limit is not None and max_length > limit:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {max_length} tokens do not fit: the model has {limit} positions (max_position_embeddings); set"
            " it to at most that",
        )


def check_new_tokens(config: PreTrainedConfig, new_tokens: int, field: str) -> None:
    """Check that a prompt of one token and `new_tokens` tokens fit into the model. Raises Failure if not."""
    limit = max_positions(config)
    if limit is not None and new_tokens >= limit:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {new_tokens} tokens leave no room for a prompt: the model has {limit} positions"
            " (max_position_embeddings); set it below that",
        )


def check_sharding(config: PreTrainedConfig, task: str, strategy: str, field: str) -> None:
    """Check that ZeRO-3 or FSDP can shard the model.

    Raises Failure if the model has batch normalisation, or for FSDP a weight that is a single number.
    """
    model = skeleton(config, task, MODEL)
    title = "FSDP" if strategy == "fsdp" else "ZeRO-3"
    if any(counts(module) for module in model.modules()):
        # The initialisation of ResNet, for example, fails on sharded weights (transformers 5.23).
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {config.model_type} keeps statistics of its batches, which {title} does not spread; use ddp or"
            " zero2 for such a model",
        )
    single = [name for name, weight in model.named_parameters() if not weight.ndim]
    if strategy == "fsdp" and single:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: FSDP divides the rows of weights, and {single[0]} is a single number; use zero3 or ddp for such"
            " a model",
        )


def check_weights_in_16_bits(config: PreTrainedConfig, task: str, field: str) -> None:
    """Check that the model can rest in bf16. Raises Failure if it has batch normalisation."""
    if any(counts(module) for module in skeleton(config, task, MODEL).modules()):
        # Running means change by a tenth of a difference, which bf16 would round away.
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {config.model_type} keeps statistics of its batches, which bf16 is too coarse for; use fp32",
        )


def cannot_recompute(config: PreTrainedConfig, task: str) -> str | None:
    """Return why the model cannot use activation checkpointing, or None if it can.

    Raises Failure if no model can be built from the configuration.
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
    except Exception as error:  # some classes claim support and have no layer that does (transformers 5.23)
        return f"{config.model_type} cannot recompute its activations ({' '.join(str(error).split())[:200]})"
    return None


def check_quantisation(config: PreTrainedConfig, allowed: Collection[str], field: str) -> None:
    """Check that the stored weights are not quantised, or by a method for which the job is known to be correct.

    `allowed` holds names of quantisation methods as transformers spells them. Raises Failure for any other method.
    """
    quantisation = getattr(config, "quantization_config", None)
    if quantisation and (method := dict(quantisation).get("quant_method")) not in allowed:
        beside = f" or one quantised with {' or '.join(sorted(allowed))}" if allowed else ""
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: its weights are quantised ({method}), which this job cannot use; choose the unquantised"
            f" model{beside}",
        )


def check_stored_type(config: PreTrainedConfig, wanted: str, field: str) -> None:
    """Check that weights that bitsandbytes has quantised have the type that the job asks for.

    transformers would load them in their stored type whatever the job asks for. Raises Failure if the types differ.
    """
    kind = stored_type(config)
    if kind not in (None, wanted):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: its weights are quantised already, in {kind}, and the job asks for {wanted}; set method.type:"
            f" lora and model.quantization.type: {kind}, or choose the unquantised model",
        )


def stored_type(config: PreTrainedConfig) -> QuantizationType | None:
    """Return the type in which bitsandbytes has quantised the stored weights; None if it has not."""
    stored = dict(getattr(config, "quantization_config", None) or {})
    if stored.get("quant_method") != "bitsandbytes":
        return None
    # fp4 is the default of bitsandbytes.
    return "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "fp4")


def check_pipeline(folder: Path, field: str, kinds: Collection[str] = PIPELINES) -> None:
    """Check that `folder` is a diffusers pipeline of one of `kinds`. Raises Failure if it is not."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: a diffusers pipeline is needed, but there is no model_index.json",
        )
    kind = json.loads(index.read_text()).get("_class_name")
    if kind not in kinds:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {kind} is not supported here; supported: {', '.join(kinds)}")
