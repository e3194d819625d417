"""Names of the files in a folder of a model, as transformers, PEFT and diffusers write them."""

from __future__ import annotations

import shutil
from pathlib import Path

from luthier_api.workspace import MANIFEST, METRICS_FILE

MODEL_CONFIG, ADAPTER_CONFIG, PIPELINE_CONFIG = "config.json", "adapter_config.json", "model_index.json"
WEIGHTS_INDEX = ".safetensors.index.json"
"""How the name of an index ends that says in which file each weight lies."""
TEXT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Of the files beside the weights: configurations, the tokenizer and its templates."""
NOT_COPIED = {ADAPTER_CONFIG, MANIFEST, METRICS_FILE}


def copy_text_files(source: Path, target: Path) -> None:
    """Copy what belongs to a model beside its weights: configurations, the tokenizer and its templates.

    Files that `target` has already stay as they are.
    """
    for file in source.iterdir():
        if file.suffix not in TEXT_SUFFIXES or file.name in NOT_COPIED or file.name.endswith(WEIGHTS_INDEX):
            continue
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)
