"""Corrects how transformers 5.23 loads a model that ZeRO-3 shards over the processes.

Each function restores what transformers does for a model that is not sharded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, modeling_utils

from luthier_trainer.models.weight_files import safetensors_header

NOT_LOADED = "not_loaded"


def weights_of_other_shape(folder: Path, shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Return the names of the tensors in `folder` whose shape differs from the one in `shapes`."""
    headers = (safetensors_header(file) for file in sorted(folder.glob("*.safetensors")))
    return {
        name
        for header in headers
        for name, tensor in header.items()
        if name in shapes and tuple(tensor["shape"]) != shapes[name]
    }


def left_out(names: Iterable[str]) -> dict[str, str]:
    """Return a `key_mapping` for `from_pretrained` that renames these tensors to names that the model does not have.

    The model then initialises those weights anew. Without ZeRO-3, `ignore_mismatched_sizes` has this effect; under
    ZeRO-3 it is ignored, and loading fails.
    """
    return {rf"^{re.escape(name)}$": f"{NOT_LOADED}.{name}" for name in names}


def keep_used_conversions(model: Any) -> None:
    """Keep only the renamings that were used in loading, so that weights are saved under their original names.

    Without ZeRO-3, transformers keeps only the renamings that were used. Under ZeRO-3 it keeps all that exist, and
    saves LayerNorm.weight as LayerNorm.gamma, a name that only transformers still reads.
    """
    if isinstance(model, PreTrainedModel) and (conversions := getattr(model, "_weight_conversions", None)):
        used = (conversion for conversion in conversions if conversion.was_used())
        model._weight_conversions = [
            conversion for conversion in used if NOT_LOADED not in conversion.target_patterns[0]
        ]


@contextmanager
def whole_ties() -> Iterator[None]:
    """Within this context, `from_pretrained` compares tied weights whole.

    If the files hold both of two tied weights, transformers ties them only where they are equal: T5 of version 1.1,
    mT5 and mT0 have an output layer of their own, although their configuration ties it. Under ZeRO-3 it compares two
    parameters that are empty until they are gathered, and would replace the output layer by the embedding.
    """
    compare = modeling_utils._tied_params_are_equal

    def gathered(source: torch.Tensor, target: torch.Tensor) -> bool:
        if not hasattr(source, "ds_id"):
            return bool(compare(source, target))
        import deepspeed

        with deepspeed.zero.GatheredParameters([source, target]):
            return bool(compare(source, target))

    modeling_utils._tied_params_are_equal = gathered
    try:
        yield
    finally:
        modeling_utils._tied_params_are_equal = compare
