"""What a model's folder says about it, before anything loads it: architecture, room for tokens, weights, modules.

Read from configurations and from the headers of safetensors files; modules are listed on the meta device, without
memory. Neighbours: `prepare`, whose checks of spec against model these are.
"""

from __future__ import annotations

import copy
import difflib
import json
import struct
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_trainer import piecemodel
from luthier_trainer.ending import Failure
from luthier_trainer.notices import notice
from luthier_trainer.taskfacts import FACTS

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

SHARED = (
    "{name} has the same weights as {other}, and the adapter changes those of {name} alone. Jobs with model.job or"
    " adapters do the same; PEFT's own merge_and_unload (0.21) would change both, so untie the weights before you"
    " call it"
)
NF4_CPU_BLOCK = 64  # bitsandbytes 0.50
ALL_LINEAR = "all-linear"
MODEL = "spec.model"
PIPELINES = ("StableDiffusionXLPipeline",)
# transformers 5.23, by changing the last of six tokens: these see it from earlier positions, and have no `is_decoder`
# that tells ...
SEE_AHEAD = {"prophetnet", "xlm", "xlnet"}
# ... and these have an `is_decoder` that is false, never read it, and look back only.
NEVER_SEE_AHEAD = {"gpt_neox", "gpt_neox_japanese"}
# transformers 5.23, by comparing rows alone and padded in a batch: these have no mask for padding, or let it into means
# and convolutions. No causal language model does.
SEE_PADDING = {"canine", "convbert", "fnet", "nystromformer", "yoso"}


def read_config(folder: Path, field: str) -> PreTrainedConfig:
    """The configuration. Raises Failure for architectures that transformers does not know without running a
    repository's code.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        raw = dict(json.loads((folder / "config.json").read_text()))
    except ValueError as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: config.json is not a JSON object: {error}") from error
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = " It brings code of its own, which is never run." if "auto_map" in raw else ""
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: transformers has no architecture {kind!r}.{code} Choose another model"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture's class fails in its own way on values that it does not expect
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: config.json cannot be used: {what}") from error


def check_task(config: PreTrainedConfig, task: str, field: str) -> None:
    """Whether the architecture can do `task`, and was not made for another one. Raises Failure."""
    if type(config) not in auto_class(task)._model_mapping:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: architecture {config.model_type} cannot do {task}; choose another model or task",
        )
    made_for = (getattr(config, "architectures", None) or [""])[0]
    if FACTS[task].labelled:
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


def skeleton(config: PreTrainedConfig, task: str | None, field: str) -> PreTrainedModel:
    """The model of `task`, or without a head, on the meta device: all modules and no memory. Raises Failure when it
    cannot be built.
    """
    import torch
    from transformers import AutoModel

    auto = auto_class(task) if task else AutoModel
    try:
        with torch.device("meta"):
            return auto.from_config(copy.deepcopy(config))
    except Exception as error:  # each architecture checks its own configuration, with exceptions of its own
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: no model can be built: {type(error).__name__}: {' '.join(str(error).split())[:500]}",
        ) from error


def auto_class(task: str) -> Any:
    """transformers' class that finds the class of a model for `task`."""
    import transformers

    return getattr(transformers, f"AutoModelFor{FACTS[task].model}")


def read_processor(folder: Path, task: str, field: str) -> Any:
    """What turns the inputs of `task` into tensors: a tokenizer, or an image processor. Raises Failure where there is
    none.
    """
    return (read_tokenizer if FACTS[task].inputs == "text" else read_image_processor)(folder, field)


def read_image_processor(folder: Path, field: str) -> BaseImageProcessor:
    """The image processor, by Pillow wherever torchvision is: the two round differently, and a model learns what it is
    shown.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, backend="pil")
    except Exception as error:  # each processor's class fails in its own way
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {folder} has no usable image processor (preprocessor_config.json):"
            f" {' '.join(str(error).split())[:300]}",
        ) from error


def read_tokenizer(folder: Path, field: str) -> PreTrainedTokenizerBase:
    """The tokenizer. One without a padding token pads with its end-of-text token: masks are built by position, so that
    nothing is hidden.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer class fails in its own way on missing files
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: {folder} has no usable tokenizer: {' '.join(str(error).split())[:300]}"
        ) from error
    piecemodel.report_differences(folder, tokenizer, field)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def room(config: PreTrainedConfig) -> int | None:
    """Positions that the model has for tokens; None when its configuration does not limit them.

    RoBERTa and its many kin (MPNet, Longformer, ...) count positions from the one after padding's, so the first rows of
    their table, which knows a padding row, are never a token's.
    """
    import torch

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    tables = [
        module
        for name, module in skeleton(config, None, MODEL).named_modules()
        # Tables of sines (XGLM) know a padding row as well, but are computed for any length.
        if "position" in name.rpartition(".")[2]
        and getattr(module, "padding_idx", None) is not None
        and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    ]
    return min([int(positions), *(table.weight.shape[0] - table.padding_idx - 1 for table in tables)])


def check_length(config: PreTrainedConfig, max_length: int, field: str) -> None:
    limit = room(config)
    if limit is not None and max_length > limit:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {max_length} tokens do not fit: the model has {limit} positions (max_position_embeddings); set"
            " it to at most that",
        )


def check_new_tokens(config: PreTrainedConfig, new_tokens: int, field: str) -> None:
    """Whether a prompt of one token and `new_tokens` more fit the model. Raises Failure."""
    limit = room(config)
    if limit is not None and new_tokens >= limit:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {new_tokens} tokens leave no room for a prompt: the model has {limit} positions"
            " (max_position_embeddings); set it below that",
        )


def safetensors_header(path: Path) -> dict[str, Any]:
    """Name → {"dtype", "shape", "data_offsets"}; the first 8 bytes of the file say how long it is."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return dict(json.loads(file.read(length)))


def check_adapters(config: PreTrainedConfig, task: str, targets: list[str], field: str) -> None:
    """Whether adapters hold all that would be learnt, and `targets` name modules that they can sit on. Raises
    Failure.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from luthier_trainer.experts import fused_experts
    from luthier_trainer.tasks.classification import whole_modules

    model = skeleton(config, task, MODEL)
    heads = whole_modules(model, set()) if FACTS[task].labelled else []
    beside = {
        name: m for name, m in model.named_modules() if not any(f"{name}.".startswith(f"{head}.") for head in heads)
    }
    if counting := next((name for name, m in beside.items() if counts(m)), None):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.method.type: {config.model_type} keeps statistics of its batches ({counting}), which change in"
            " training and which no adapter holds: the result would not be what was trained. Use method.type: full",
        )
    if ALL_LINEAR in targets:
        if len(targets) > 1:
            at = targets.index(ALL_LINEAR)
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[{at}]: {ALL_LINEAR} takes all linear modules; leave the others out, or it",
            )
        # PEFT takes these, and no embeddings.
        if not any(isinstance(m, torch.nn.Linear | Conv1D) for m in beside.values()):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[0]: {config.model_type} has no linear modules for {ALL_LINEAR}. Use method.type: full",
            )
        return
    fitting = {name: m for name, m in beside.items() if isinstance(m, torch.nn.Linear | torch.nn.Embedding | Conv1D)}
    linear = [name for name, m in fitting.items() if not looks_up_otherwise(m)]
    known = sorted({name.rpartition(".")[2] for name in linear})
    shared = tied_modules(model)
    for i, target in enumerate(targets):
        if target in heads:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[{i}]: {target!r} is the head, which is trained whole in any case; leave it out",
            )
        if other := next(
            (m for name, m in fitting.items() if f".{name}".endswith(f".{target}") and looks_up_otherwise(m)), None
        ):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[{i}]: {target!r} is a {type(other).__name__}, whose rows are found in another way than PEFT's"
                " adapters do; leave it out",
            )
        for name in shared:
            if f".{name}".endswith(f".{target}"):
                notice(f"{field}[{i}]: {SHARED.format(name=name, other=shared[name])}")
        # Of mixtures of experts, `experts.check_adapters` asks PEFT, which knows names from before their weights became
        # one parameter.
        if not fused_experts(model) and not any(name == target or name.endswith(f".{target}") for name in linear):
            near = difflib.get_close_matches(target, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Or use {ALL_LINEAR} alone"
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[{i}]: the model has no module {target!r} (it has: {', '.join(known)}).{hint}",
            )


def looks_up_otherwise(module: torch.nn.Module) -> bool:
    """Whether an embedding finds its rows in a way of its own, from an offset say, which PEFT 0.21 does not follow. It
    does know of a scale.
    """
    import torch

    own = isinstance(module, torch.nn.Embedding) and type(module).forward is not torch.nn.Embedding.forward
    return own and not hasattr(module, "embed_scale")


def tied_modules(model: torch.nn.Module) -> dict[str, str]:
    """Name of each module whose weight is another module's too → the name of that one."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            names.setdefault(id(weight), []).append(name.removesuffix(".weight"))
    return {name: other for group in names.values() for name in group for other in group if other != name}


def counts(module: torch.nn.Module) -> bool:
    """Whether a module keeps statistics of the batches that it has seen."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm) and module.track_running_stats


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


def check_quantisable(config: PreTrainedConfig, field: str) -> None:
    """Whether bitsandbytes can quantise the model to 4 bits on CPU: its kernels there want rows of a multiple of 64.
    Raises Failure.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(text, name, None)
        if isinstance(width, int) and width % NF4_CPU_BLOCK:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: qlora on CPU needs widths of a multiple of {NF4_CPU_BLOCK}, and the model's {name} is"
                f" {width}; use lora, or a GPU",
            )


def check_pipeline(folder: Path, field: str) -> None:
    """Whether `folder` is a diffusers pipeline that text-to-image runs."""
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
