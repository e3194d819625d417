"""What the folder of a model says about it before anything loads it: architecture, positions, modules.

Read from the configuration. Modules are listed on the meta device, which takes no memory.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.tasks import TASKS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.model_files import MODEL_CONFIG

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

ALL_LINEAR = "all-linear"
MODEL = "spec.model"
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
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each architecture's class fails in its own way on values that it does not expect
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        raise Failure(ExitCode.INVALID_SPEC, f"{field}: config.json cannot be used: {what}") from error


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

    return getattr(transformers, f"AutoModelFor{TASKS[task].auto_model}")


def max_positions(config: PreTrainedConfig) -> int | None:
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
