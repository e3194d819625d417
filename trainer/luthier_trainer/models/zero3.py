"""Loading a model that ZeRO-3 spreads over the processes: what transformers 5.23 does otherwise than for a model in one
piece, put right.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from luthier_trainer.models.weight_files import safetensors_header

NOT_LOADED = "not_loaded"


def weights_of_other_shape(folder: Path, shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """Names of the tensors in `folder` that have another shape than `shapes` says."""
    headers = (safetensors_header(file) for file in sorted(folder.glob("*.safetensors")))
    return {
        name
        for header in headers
        for name, tensor in header.items()
        if name in shapes and tuple(tensor["shape"]) != shapes[name]
    }


def left_out(names: Iterable[str]) -> dict[str, str]:
    """`key_mapping` of `from_pretrained` that makes tensors of these names unknown to the model, which then begins
    those weights anew.

    In one piece, `ignore_mismatched_sizes` does so. Under ZeRO-3 it is ignored, and the load fails.
    """
    return {rf"^{re.escape(name)}$": f"{NOT_LOADED}.{name}" for name in names}


def keep_used_conversions(model: Any) -> None:
    """Save weights under the names that they were loaded by.

    In one piece, a model remembers the renamings that were used. Under ZeRO-3 it remembers all there are, and saves
    LayerNorm.weight as LayerNorm.gamma, a name that only transformers still reads.
    """
    if isinstance(model, PreTrainedModel) and (conversions := getattr(model, "_weight_conversions", None)):
        used = (conversion for conversion in conversions if conversion.was_used())
        model._weight_conversions = [
            conversion for conversion in used if NOT_LOADED not in conversion.target_patterns[0]
        ]
