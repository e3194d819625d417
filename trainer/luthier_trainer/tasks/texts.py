"""Rows of text, as `prepare` sees them: which fit, whether the model takes them, and as tokens.

Neighbours: `tokens` and `packing` make the tokens; `images` does the same for rows of images.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_trainer.data import columns, packing, tokens
from luthier_trainer.data.load import Rows
from luthier_trainer.data.reading import Reader
from luthier_trainer.models import checks, inspect, processors
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.runtime.taskfacts import FACTS

if TYPE_CHECKING:
    import numpy
    from datasets import Dataset
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

WORKERS = 2  # enough to keep padding off the GPU's path
FIELD = "spec.dataset.columns.text"


class TextTask:
    """What the tasks share whose rows hold a text."""

    def read_processor(self, folder: Path, field: str) -> PreTrainedTokenizerBase:
        return processors.read_tokenizer(folder, field)

    def loader_workers(self, cores: int) -> int:
        return WORKERS


def column(spec: FineTuneJobSpec) -> str:
    return spec.dataset.columns.text


def fitting(rows: Rows, spec: FineTuneJobSpec) -> Rows:
    """The rows that have a text. Raises Failure."""
    return columns.texts(rows, column(spec), FIELD, drop_blank=not FACTS[spec.task].labelled)


def check(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, rows: int) -> None:
    """Whether model and tokenizer are made for such rows. Raises Failure."""
    checks.check_length(config, spec.training.max_length, tokens.MAX_LENGTH)
    if not FACTS[spec.task].labelled and tokenizer.eos_token_id is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{inspect.MODEL}: its tokenizer has no end-of-text token, so the model could not learn where a text"
            " ends. Choose another model, or add eos_token to its tokenizer_config.json",
        )
    if config.model_type in inspect.SEE_PADDING and spec.training.micro_batch_size != 1:
        notice(
            f"{inspect.MODEL}: {config.model_type} does not mask padding, so what it makes of a text depends a"
            " little on the length of the texts beside it. Set spec.training.microBatchSize: 1 to learn without"
            " padding"
        )
    if tokenizer.pad_token_id is None:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{inspect.MODEL}: its tokenizer has neither a padding nor an end-of-text token; rows cannot form batches",
        )


def encoded(
    rows: Rows, ids: numpy.ndarray | None, tokenizer: PreTrainedTokenizerBase, spec: FineTuneJobSpec, use: str
) -> Dataset:
    """The rows as `train` reads them. `ids`: the class of each, where they are classified. `use`: training or held-out,
    for notices.
    """
    text, longest = column(spec), spec.training.max_length
    reader = Reader(tokenizer, spec.dataset.parse_special_tokens)
    reader.check_spellings(rows.data, text, FIELD, f"{use} {'lines' if rows.documents else 'rows'} of {rows.origin}")
    if ids is not None:
        return tokens.classification_rows(rows.data, text, ids, reader, longest, use)
    if spec.training.packing:
        return packing.blocks(rows.data, text, reader, longest, rows.documents)
    return tokens.language_rows(rows.data, text, reader, longest, use)
