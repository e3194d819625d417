"""What a model's folder says about it, before anything loads it: architecture, room for tokens, weights, modules.

Read from configurations and from the headers of safetensors files; modules are listed on the meta device, without memory.
Neighbours: `prepare`, whose checks of spec against model these are.
"""

from __future__ import annotations

import difflib
import json
import struct
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer.ending import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

NF4_CPU_BLOCK = 64  # bitsandbytes 0.50
PIPELINES = ("StableDiffusionXLPipeline",)


def read_config(folder: Path, field: str) -> PreTrainedConfig:
    """The configuration. Raises Failure for architectures that transformers does not know without running a repository's code."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    raw = json.loads((folder / "config.json").read_text())
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = " It brings code of its own, which is never run." if "auto_map" in raw else ""
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: transformers has no architecture {kind!r}.{code} Choose another model")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, OSError) as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: config.json cannot be used: {' '.join(str(error).split())[:500]}") from error


def check_task(config: PreTrainedConfig, task: str, field: str) -> None:
    """Whether the architecture can do `task`, and was not made for another one. Raises Failure."""
    mapping = _model_classes(task)
    if type(config) not in mapping:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: architecture {config.model_type} cannot do {task}; choose another model or task")
    made_for = (getattr(config, "architectures", None) or [""])[0]
    if task in ("causal-lm", "text-generation") and made_for.endswith("ForSequenceClassification"):
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: the model is a classifier ({made_for}) and has no head for {task}")


def _model_classes(task: str) -> Any:
    from transformers.models.auto import modeling_auto as auto

    return auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if task == "text-classification" else auto.MODEL_FOR_CAUSAL_LM_MAPPING


def read_tokenizer(folder: Path, field: str) -> PreTrainedTokenizerBase:
    """The tokenizer. One without a padding token pads with its end-of-text token: masks are built by position, so that nothing is hidden."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way on missing files
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {folder} has no usable tokenizer: {' '.join(str(error).split())[:300]}") from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def room(config: PreTrainedConfig) -> int | None:
    """Positions that the model has, in tokens; None when its configuration does not limit them."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    # RoBERTa and its kin count positions from padding + 1
    return int(positions) - (2 if getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert") else 0)


def check_length(config: PreTrainedConfig, max_length: int, field: str) -> None:
    limit = room(config)
    if limit is not None and max_length > limit:
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: {max_length} tokens do not fit: the model has {limit} positions (max_position_embeddings); set it to at most that"
        )


def count_weights(folder: Path) -> int:
    """Elements of all tensors in the safetensors files directly in `folder`, from their headers."""
    return sum(
        prod(tensor["shape"])
        for path in folder.glob("*.safetensors")
        for name, tensor in safetensors_header(path).items()
        if name != "__metadata__"
    )


def safetensors_header(path: Path) -> dict[str, Any]:
    """Name → {"dtype", "shape", "data_offsets"}; the first 8 bytes of the file say how long it is."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))


def check_target_modules(config: PreTrainedConfig, task: str, targets: list[str], field: str) -> None:
    """Whether each of `targets` names modules that adapters can sit on. Raises Failure with the names that the model has."""
    if targets == ["all-linear"]:
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.pytorch_utils import Conv1D

    auto = AutoModelForSequenceClassification if task == "text-classification" else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D)]
    known = sorted({name.rpartition(".")[2] for name in linear})
    for i, target in enumerate(targets):
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            near = difflib.get_close_matches(target, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else " Or use all-linear"
            raise Failure(ExitCode.INVALID_SPEC, f"{field}[{i}]: the model has no module {target!r} (it has: {', '.join(known)}).{hint}")


def check_quantisable(config: PreTrainedConfig, field: str) -> None:
    """Whether bitsandbytes can quantise the model to 4 bits on CPU: its kernels there want rows of a multiple of 64. Raises Failure."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(text, name, None)
        if isinstance(width, int) and width % NF4_CPU_BLOCK:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: qlora on CPU needs widths of a multiple of {NF4_CPU_BLOCK}, and the model's {name} is {width}; use lora, or a GPU",
            )


def check_pipeline(folder: Path, field: str) -> None:
    """Whether `folder` is a diffusers pipeline that text-to-image runs."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: text-to-image needs a diffusers pipeline, but there is no model_index.json")
    kind = json.loads(index.read_text()).get("_class_name")
    if kind not in PIPELINES:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {kind} is not supported; text-to-image runs {', '.join(PIPELINES)}")
