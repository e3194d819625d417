"""Checks of a method against the model: which modules can have adapters, and which weights can be quantised."""

from __future__ import annotations

import difflib
import re
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.method import Method
from luthier_api.methods import QUANTIZATIONS, QuantizationType
from luthier_trainer.methods.old_names import present_names
from luthier_trainer.methods.whole import named, whole_modules
from luthier_trainer.models.embedding import token_tables
from luthier_trainer.models.inspect import ALL_LINEAR, MODEL, counts, looks_up_otherwise, skeleton, tied_modules
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

SHARED = (
    "{name} has the same weights as {other}, and the adapter changes those of {name} alone. Jobs with model.job or"
    " adapters do the same; PEFT's own merge_and_unload (0.21) would change both, so untie the weights before you"
    " call it"
)


def check_adapters(config: PreTrainedConfig, task: str, targets: list[str], field: str) -> None:
    """Check that adapters hold everything that is trained, and that `targets` name modules which can have adapters.

    Raises Failure if not. `field`: the field of the spec that holds `targets`.
    """
    from luthier_trainer.models.heads import heads_of

    model = skeleton(config, task, MODEL)
    check_modules(model, config.model_type, heads_of(model, task), targets, field)


def check_modules(model: torch.nn.Module, kind: str, heads: list[str], targets: list[str], field: str) -> None:
    """Check `targets` against the modules of `model`. Raises Failure if one of them cannot have an adapter.

    `kind`: the name of the model in messages. `heads`: modules whose own weights are all trained.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    from luthier_trainer.methods.experts import fused_experts

    beside = {
        name: m for name, m in model.named_modules() if not any(f"{name}.".startswith(f"{head}.") for head in heads)
    }
    if counting := next((name for name, m in beside.items() if counts(m)), None):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.method.type: {kind} keeps statistics of its batches ({counting}), which change in"
            " training and which no adapter holds: the result would not be what was trained. Use method.type: full",
        )
    if not targets:
        return
    if ALL_LINEAR in targets:
        if len(targets) > 1:
            at = targets.index(ALL_LINEAR)
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[{at}]: {ALL_LINEAR} takes all linear modules; leave the others out, or it",
            )
        # all-linear selects these types of modules, but no embeddings.
        if not any(isinstance(m, torch.nn.Linear | Conv1D) for m in beside.values()):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[0]: {kind} has no linear modules for {ALL_LINEAR}. Use method.type: full",
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
        # For mixtures of experts, `experts.check_adapters` lets PEFT check the names. PEFT also knows the names that
        # modules had before transformers merged the weights of the experts into one parameter.
        if not fused_experts(model) and not any(name == target or name.endswith(f".{target}") for name in linear):
            near = difflib.get_close_matches(target, known, 1)
            hint = f" Did you mean {near[0]!r}?" if near else f" Or use {ALL_LINEAR} alone"
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}[{i}]: the model has no module {target!r} (it has: {', '.join(known)}).{hint}",
            )


def names_with_adapters(config: PreTrainedConfig, task: str, method: Method) -> list[str]:
    """Return the names of the modules that get an adapter."""
    from luthier_trainer.methods.trainable import adapted_modules
    from luthier_trainer.models.heads import heads_of

    model = skeleton(config, task, MODEL)
    return adapted_modules(model, method, whole_modules(model, method, heads_of(model, task)))


def check_patterns(config: PreTrainedConfig, task: str, method: Method) -> None:
    """Check that each pattern and each layer of the method belongs to a module with an adapter, which PEFT does not.

    Raises Failure if one does not.
    """
    from luthier_trainer.methods.lora import layer_of, matching
    from luthier_trainer.methods.trainable import adapted_modules
    from luthier_trainer.models.heads import heads_of

    patterns = {"rankPattern": method.rank_pattern, "alphaPattern": method.alpha_pattern}
    if not any(patterns.values()) and method.layers is None:
        return
    model = skeleton(config, task, MODEL)
    everywhere = method.model_copy(update={"layers": None})
    heads = whole_modules(model, method, heads_of(model, task))
    names = adapted_modules(model, everywhere, heads)
    numbers = {number for name in names if (number := layer_of(name)) is not None}
    for i, layer in enumerate(method.layers or []):
        if layer not in numbers:
            there = f"0 to {max(numbers)}" if numbers else "none"
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.method.layers[{i}]: no module with an adapter is in layer {layer} (layers: {there})",
            )
    adapted = [name for name in names if method.layers is None or layer_of(name) in method.layers]
    for field, given in patterns.items():
        for pattern in given or {}:
            try:
                found = any(matching([pattern], name) for name in adapted)
            except re.error as error:
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"spec.method.{field}: {pattern!r} is not a regular expression of Python: {error}",
                ) from None
            if not found:
                known = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"spec.method.{field}: no module with an adapter has a name that ends with {pattern!r} (they end"
                    f" with: {known})",
                )


def check_initial(config: PreTrainedConfig, task: str, method: Method) -> None:
    """Check that each adapter can begin as `initLoraWeights` says. Raises Failure if one cannot."""
    import torch
    from transformers.pytorch_utils import Conv1D

    from luthier_trainer.methods.experts import fused_experts
    from luthier_trainer.methods.lora import begins_by_weights, matching
    from luthier_trainer.methods.trainable import adapted_modules
    from luthier_trainer.models.heads import heads_of

    kind, field = method.init_lora_weights, "spec.method.initLoraWeights"
    if kind is None or kind == "gaussian":
        return
    model = skeleton(config, task, MODEL)
    whole = whole_modules(model, method, heads_of(model, task))
    if any(name.rpartition(".")[2] in method.target_modules for name in fused_experts(model)):
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: {kind} is for linear modules, and the experts are none")
    for name in adapted_modules(model, method, whole):
        module = model.get_submodule(name)
        # bitsandbytes keeps the weights of a Conv1D transposed.
        if not isinstance(module, torch.nn.Linear if kind == "loftq" else torch.nn.Linear | Conv1D):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {kind} is for linear modules, and {name} is none; use gaussian, or remove it from"
                " targetModules",
            )
        pattern = matching(method.rank_pattern or {}, name)
        rank = method.rank if pattern is None else method.rank_pattern[pattern]
        if begins_by_weights(method) and rank > min(module.weight.shape):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {name} has {min(module.weight.shape)} singular values, and its rank is {rank}; choose a"
                " smaller rank, or gaussian",
            )
        if kind == "orthogonal" and rank % 2:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: orthogonal needs even ranks, and that of {name} is {rank}",
            )


def check_biases(config: PreTrainedConfig, task: str, method: Method) -> None:
    """Check that the model has the biases that the method trains. Raises Failure if it has none."""
    from luthier_trainer.methods.trainable import adapted_modules, biases_of
    from luthier_trainer.models.heads import heads_of

    if (method.bias or "none") == "none":
        return
    model = skeleton(config, task, MODEL)
    whole = whole_modules(model, method, heads_of(model, task))
    if not any(name for name, _ in biases_of(model, method, adapted_modules(model, method, whole), whole)):
        where = "" if method.bias == "all" else " in modules with an adapter"
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.method.bias: {config.model_type} has no biases{where}, so that nothing would be trained; remove it",
        )


def check_new_tokens(config: PreTrainedConfig, task: str, method: Method) -> None:
    """Check that the modules whose rows of new tokens are trained are not named by the method, too.

    Raises Failure if one is.
    """
    model = skeleton(config, task, MODEL)
    for field, asked in (("targetModules", method.target_modules), ("modulesToSave", method.modules_to_save or [])):
        for i, name in enumerate(asked):
            ends = present_names(model, name, f"spec.method.{field}")
            if table := next((table for table in token_tables(model) if any(named(table, end) for end in ends)), None):
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"spec.method.{field}[{i}]: the rows of new tokens of {table} are trained by themselves; remove it,"
                    " or model.addSpecialTokens, model.tokenizer and model.resizeEmbeddings",
                )


WITHOUT_QUANTIZATION = "use method.type: lora without model.quantization, or a GPU"


def check_quantisable(
    config: PreTrainedConfig, kind: QuantizationType, field: str, remedy: str = WITHOUT_QUANTIZATION
) -> None:
    """Check that bitsandbytes can quantise the model on a CPU, where some kernels need rows of a certain multiple.

    Raises Failure, with `remedy`, if not.
    """
    multiple = QUANTIZATIONS[kind].cpu_multiple
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("hidden_size", "intermediate_size"):
        width = getattr(text, name, None)
        if isinstance(width, int) and width % multiple:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {kind} on CPU needs widths of a multiple of {multiple}, and the model's {name} is {width};"
                f" {remedy}",
            )
