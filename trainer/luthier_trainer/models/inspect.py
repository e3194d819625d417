"""Reads from a model's folder, before the model is loaded, its architecture, positions and modules.

Only the configuration is read. Modules are listed on the meta device, which takes no memory.
"""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.tasks import TASKS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.model_files import MODEL_CONFIG

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

ALL_LINEAR = "all-linear"
MODEL = "spec.model"
DROPPED_LAYERS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
# Measured with transformers 5.23 by comparing rows alone and padded in a batch: these architectures have no mask for
# padding, or include padding in means and convolutions. No causal language model does.
SEE_PADDING = {"canine", "convbert", "fnet", "nystromformer", "yoso"}

# Set on a configuration that ties the output layer to the embedding, although the model has an output layer of its own.
OWN_OUTPUT = "has_own_output"
TIES = "tie_word_embeddings"


def read_config(folder: Path, field: str) -> PreTrainedConfig:
    """Return the configuration of the model in `folder`.

    Raises Failure if it cannot be read, or if transformers does not know the architecture without running code of the
    repository.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        raw = dict(json.loads((folder / MODEL_CONFIG).read_text()))
    except ValueError as error:
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: config.json is not a JSON object: {error}") from error
    kind = raw.get("model_type")
    if kind not in CONFIG_MAPPING:
        code = " It brings code of its own, which is never run." if "auto_map" in raw else ""
        raise Failure(
            ExitCode.INVALID_SPEC, f"{field}: transformers has no architecture {kind!r}.{code} Choose another model"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture's class fails in its own way on values that it does not expect
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: config.json cannot be used: {what}") from error
    # transformers 5.23 ties the output layer in each configuration of T5, mT5, umT5 and LongT5, whatever config.json
    # says, and unties it when the files hold both weights.
    if getattr(config, TIES, False) and raw.get(TIES) is False:
        setattr(config, OWN_OUTPUT, True)
    return config


def skeleton(config: PreTrainedConfig, task: str | None, field: str) -> PreTrainedModel:
    """Return the model for `task`, or without a head if that is None, on the meta device: all modules and no memory.

    Raises Failure if the model cannot be built from the configuration.
    """
    import torch
    from transformers import AutoModel

    auto, own = auto_class(task) if task else AutoModel, copy.deepcopy(config)
    own.update(whole_layers(own))
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(own)
    except Exception as error:  # each architecture checks its own configuration, with exceptions of its own
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: no model can be built: {type(error).__name__}: {' '.join(str(error).split())[:500]}",
        ) from error
    output = model.get_output_embeddings()
    if getattr(config, OWN_OUTPUT, False) and output is not None:
        output.weight = torch.nn.Parameter(torch.empty_like(output.weight))
    return model


def whole_layers(config: PreTrainedConfig) -> dict[str, float]:
    """Return settings with which a model leaves out no layer at random.

    Several processes would leave out different ones, and what is planned would depend on what is drawn.
    """
    return {name: 0.0 for name in DROPPED_LAYERS if getattr(config, name, 0)}


def notice_whole_layers(config: PreTrainedConfig) -> None:
    """Give notice of what `whole_layers` changes."""
    if dropped := whole_layers(config):
        listed = ", ".join(f"{name} {getattr(config, name):g}" for name in dropped)
        notice(
            f"{MODEL}: its config.json lets whole layers out at random while it learns ({listed}), which several"
            " processes would do in different layers; they are set to 0, in the result, too"
        )


def auto_class(task: str) -> Any:
    """Return the class of transformers that selects the model class for `task`, such as AutoModelForCausalLM."""
    import transformers

    return getattr(transformers, str(TASKS[task].auto_class))


@cache
def classes(task: str) -> frozenset[str]:
    """Return the names of the classes of transformers that `auto_class` selects from."""
    names = auto_class(task)._model_mapping._model_mapping.values()
    return frozenset(name for entry in names for name in ([entry] if isinstance(entry, str) else entry))


def max_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of tokens that the model has positions for; None if its configuration sets no limit.

    RoBERTa and related architectures (MPNet, Longformer, ...) count positions from padding_idx + 1. The first rows of
    their position table, which has a padding row, are therefore never used for a token, and are subtracted.
    """
    import torch

    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None:
        return None
    tables = [
        module
        for name, module in skeleton(config, None, MODEL).named_modules()
        # Sinusoidal tables (XGLM) have a padding row as well, but are computed for any length.
        if "position" in name.rpartition(".")[2]
        and getattr(module, "padding_idx", None) is not None
        and isinstance(getattr(module, "weight", None), torch.nn.Parameter)
    ]
    return min([int(positions), *(table.weight.shape[0] - table.padding_idx - 1 for table in tables)])


def looks_up_otherwise(module: torch.nn.Module) -> bool:
    """Return whether an embedding looks up its rows in its own way, for example from an offset.

    PEFT 0.21 does not reproduce this in its adapter for embeddings, except for a scale (`embed_scale`).
    """
    import torch

    own = isinstance(module, torch.nn.Embedding) and type(module).forward is not torch.nn.Embedding.forward
    return own and not hasattr(module, "embed_scale")


def tied_modules(model: torch.nn.Module) -> dict[str, str]:
    """Return module → another module that shares its weight, by name.

    Only modules with a shared weight are in the result, each of them as a key.
    """
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name.endswith(".weight"):
            names.setdefault(id(weight), []).append(name.removesuffix(".weight"))
    return {name: other for group in names.values() for name in group for other in group if other != name}


def counts(module: torch.nn.Module) -> bool:
    """Return whether a module keeps running statistics of the batches that it has seen (batch normalisation)."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return isinstance(module, _BatchNorm) and module.track_running_stats
