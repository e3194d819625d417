"""Tokens against rows: a token beyond the last row of the embedding stops a training at its first batch, on a GPU
without naming it.

Some models are published with such tokens and never use them (Gemma 3 1B has one for images), so it counts whether they
can occur: ordinary ones can in any text; those with a task of their own, such as padding, do.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models import inspect
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.model_files import copy_text_files

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

RESIZE = "spec.model.resizeEmbeddings"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
SHOWN = 3  # tokens in a message
Tokens = Mapping[str, int]


def without_row(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, task: str, field: str) -> Tokens:
    """The tokens whose number is beyond the last row of the embedding, by number. None where the model has no table of
    tokens.
    """
    import torch

    table = inspect.skeleton(config, task, field).get_input_embeddings()
    if not isinstance(table, torch.nn.Embedding):
        return {}  # CANINE, for one, hashes characters
    rows = table.num_embeddings
    return {
        token: number
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= rows
    }


def check(beyond: Tokens, tokenizer: PreTrainedTokenizerBase, field: str, remedy: str) -> None:
    """Raise Failure where one of the tokens `beyond` can occur in any text, or is used by the job itself."""
    special = {str(token) for token in tokenizer.all_special_tokens}
    special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    roles = {getattr(tokenizer, role, None) for role in ROLES}
    if used := {token: number for token, number in beyond.items() if token not in special or token in roles}:
        raise refusal(used, tokenizer, field, remedy)


def check_rows(
    beyond: Tokens,
    data: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    field: str,
    remedy: str,
    columns: Collection[str] = ("input_ids",),
) -> None:
    """Raise Failure where one of the tokens `beyond` occurs in the rows that will be learnt or measured on. `columns`:
    those with lists of tokens.
    """
    if not beyond:
        return
    import pyarrow.compute

    occurring: set[int] = set()
    for split in data.values():
        for batch in split.with_format("arrow").iter(1000):
            for column in columns:
                occurring.update(pyarrow.compute.unique(pyarrow.compute.list_flatten(batch[column])).to_pylist())
    settle({token: number for token, number in beyond.items() if number in occurring}, beyond, tokenizer, field, remedy)


def check_prompts(
    beyond: Tokens, prompts: Iterable[str], tokenizer: PreTrainedTokenizerBase, field: str, remedy: str
) -> None:
    """Raise Failure where one of the tokens `beyond` is spelled out in a prompt."""
    if beyond:
        spelled = {token for prompt in prompts for token in beyond if token in prompt}
        settle(
            {token: number for token, number in beyond.items() if token in spelled}, beyond, tokenizer, field, remedy
        )


def settle(used: Tokens, beyond: Tokens, tokenizer: PreTrainedTokenizerBase, field: str, remedy: str) -> None:
    """Raise Failure for tokens that are used; say which are there for nothing."""
    if used:
        raise refusal(used, tokenizer, field, remedy)
    notice(
        f"{field}: {len(beyond)} of the tokenizer's tokens have no row in the model's embedding ({some(beyond)}). None"
        " of the job's texts has one"
    )


def refusal(used: Tokens, tokenizer: PreTrainedTokenizerBase, field: str, remedy: str) -> Failure:
    return Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: its tokenizer has {len(tokenizer)} tokens, and {len(used)} of those in use have no row in the"
        f" model's embedding: {some(used)}. {remedy}",
    )


def some(tokens: Tokens) -> str:
    """Tokens with their numbers."""
    return ", ".join(f"{token} ({number})" for token, number in list(tokens.items())[:SHOWN]) + ", ..." * (
        len(tokens) > SHOWN
    )


def resized(
    path: Path, config: PreTrainedConfig, beyond: Tokens, task: str, seed: int, field: str, folder: WorkspaceFolder
) -> Path:
    """A copy of the model in `prepared/model` with a row for each of the tokens `beyond`; weights that it lacks (a new
    head) stay absent.

    The whole model is in memory meanwhile. The new rows are drawn, by `seed`, around the mean of the others and as wide
    as those spread.
    """
    from transformers import set_seed

    kind: Any = type(inspect.skeleton(config, task, field))
    model, loaded = kind.from_pretrained(
        path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **OWN_WEIGHTS
    )
    new = set(loaded["missing_keys"]) | {name for name, *_ in loaded["mismatched_keys"]}
    before = model.get_input_embeddings().num_embeddings
    output = model.get_output_embeddings()
    if output is not None and output.weight is not model.get_input_embeddings().weight:
        # transformers 5.23 does not tie two weights that differ in the files, whatever the configuration says; resizing
        # would.
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    set_seed(seed)
    model.resize_token_embeddings(max(beyond.values()) + 1)
    target, staged = folder.prepared / "model", folder.prepared / "model.resized"
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(
        staged, state_dict={name: weight for name, weight in model.state_dict().items() if name not in new}
    )
    copy_text_files(path, staged)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    notice(
        f"{RESIZE}: {len(beyond)} tokens had no row in the embedding ({some(beyond)}). Each has one now, drawn around"
        f" the mean of the other {before:,}, and learns with them"
    )
    return target
