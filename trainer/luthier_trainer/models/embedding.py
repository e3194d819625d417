"""Tokens that have no row in the model's embedding, and tokens that the job adds.

Such a token stops a training at its first batch, with an error on the GPU that does not name the token. Some models are
published with such tokens and never use them (Gemma 3 1B has one for images). So the checks ask whether it can occur:
an ordinary token can occur in any text, and one with a role, such as padding, is used by the job itself.

A job can ask for rows. A model that is trained whole gets them in `prepare`; an adapter holds the values of its own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models import inspect
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.workspace.model_files import ADAPTER_CONFIG, copy_text_files

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

RESIZE, ADD = "spec.model.resizeEmbeddings", "spec.model.addSpecialTokens"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
PIECES = "spec.model.tokenizer"
SHOWN = 3  # tokens in a message
Tokens = Mapping[str, int]
Parts = Mapping[int, Sequence[int]]
"""Id of a token → ids of the tokens with the mean of whose rows it begins."""


def without_row(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, task: str, field: str) -> Tokens:
    """Return token → id of the tokens whose id is beyond the last row of the embedding, in the order of ids.

    Returns nothing if the model has no table of embeddings. Raises Failure if the model cannot be built.
    """
    import torch

    table = inspect.skeleton(config, task, field).get_input_embeddings()
    if not isinstance(table, torch.nn.Embedding):
        return {}  # CANINE, for example, hashes characters
    rows = table.num_embeddings
    return {
        token: number
        for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        if number >= rows
    }


def add(tokenizer: PreTrainedTokenizerBase, asked: Sequence[str], field: str = ADD) -> Tokens:
    """Add tokens to the tokenizer, and return those that it did not have: token → id. `field`: of the spec.

    They are control tokens: decoding with `skip_special_tokens` leaves them out. It gives notice of those that were
    there.
    """
    there = [token for token in asked if token in tokenizer.get_vocab()]
    if there:
        notice(f"{field}: the tokenizer has {', '.join(there[:SHOWN])} already, which stay as they are")
    added = list(dict.fromkeys(token for token in asked if token not in there))
    tokenizer.add_tokens(added, special_tokens=True)
    return {token: int(tokenizer.convert_tokens_to_ids(token)) for token in added}


def check(beyond: Tokens, tokenizer: PreTrainedTokenizerBase, field: str, remedy: str) -> None:
    """Check that no token of `beyond` can occur in any text, or is used by the job itself.

    `beyond` are the tokens without a row, `remedy` ends the error message. Raises Failure if there is such a token.
    """
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
    """Check that no token of `beyond` occurs in the rows for training or evaluation.

    `columns` are the columns of `data` that hold lists of token ids. Raises Failure if one occurs.
    """
    if beyond:
        occurring = occurring_in(data, columns)
        used = {token: number for token, number in beyond.items() if number in occurring}
        settle(used, beyond, tokenizer, field, remedy)


def occurring_in(data: DatasetDict, columns: Collection[str]) -> set[int]:
    """Return the ids of the tokens in the rows for training and evaluation, in `columns`, which hold lists of ids."""
    import pyarrow.compute

    occurring: set[int] = set()
    for split in data.values():
        for batch in split.with_format("arrow").iter(1000):
            for column in columns:
                occurring.update(pyarrow.compute.unique(pyarrow.compute.list_flatten(batch[column])).to_pylist())
    return occurring


def notice_absent(
    new: Collection[int], data: DatasetDict, tokenizer: PreTrainedTokenizerBase, columns: Collection[str]
) -> None:
    """Give notice of new tokens that no row has, whose rows of the embedding therefore stay as they were drawn."""
    if not new:
        return
    occurring = occurring_in(data, columns)
    absent = {str(tokenizer.convert_ids_to_tokens(number)): number for number in new if number not in occurring}
    if absent:
        notice(
            f"spec.model: {len(absent)} of {len(new)} new tokens occur in no row ({some(absent)}). Nothing is learnt"
            " about their meaning"
        )


def check_prompts(
    beyond: Tokens, prompts: Iterable[str], tokenizer: PreTrainedTokenizerBase, field: str, remedy: str
) -> None:
    """Check that no token of `beyond` is spelled out in a prompt. Raises Failure if one is."""
    if beyond:
        spelled = {token for prompt in prompts for token in beyond if token in prompt}
        settle(
            {token: number for token, number in beyond.items() if token in spelled}, beyond, tokenizer, field, remedy
        )


def settle(used: Tokens, beyond: Tokens, tokenizer: PreTrainedTokenizerBase, field: str, remedy: str) -> None:
    """Raise Failure if tokens without a row are used; otherwise give notice of those that exist and are not used."""
    if used:
        raise refusal(used, tokenizer, field, remedy)
    notice(
        f"{field}: {len(beyond)} of the tokenizer's tokens have no row in the model's embedding ({some(beyond)}). None"
        " of the job's texts has one"
    )


def refusal(used: Tokens, tokenizer: PreTrainedTokenizerBase, field: str, remedy: str) -> Failure:
    """Return the Failure for tokens that are used and have no row."""
    return Failure(
        ExitCode.INVALID_SPEC,
        f"{field}: its tokenizer has {len(tokenizer)} tokens, and {len(used)} of those in use have no row in the"
        f" model's embedding: {some(used)}. {remedy}",
    )


def some(tokens: Tokens) -> str:
    """Return the first tokens with their ids, for a message."""
    return ", ".join(f"{token} ({number})" for token, number in list(tokens.items())[:SHOWN]) + ", ..." * (
        len(tokens) > SHOWN
    )


def resized(
    path: Path,
    config: PreTrainedConfig,
    new: Tokens,
    task: str,
    seed: int,
    field: str,
    folder: WorkspaceFolder,
    parts: Parts = MappingProxyType({}),
) -> Path:
    """Save a copy of the model with a row for each token of `new` to `prepared/model`, and return its folder.

    Weights that the files lack (a new head) stay absent in the copy. The whole model is in memory meanwhile. The new
    rows are drawn with `seed`, from a normal distribution with the mean and the covariance of the existing rows. Those
    of `parts` begin as `begin_as_means` says.
    """
    from transformers import set_seed

    kind: Any = type(inspect.skeleton(config, task, field))
    model, loaded = kind.from_pretrained(
        path, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **OWN_WEIGHTS
    )
    # Not saved, so that `train` initialises them: they hold random values here.
    absent = set(loaded["missing_keys"]) | {name for name, *_ in loaded["mismatched_keys"]}
    before = model.get_input_embeddings().num_embeddings
    set_seed(seed)
    with_rows(model, max(new.values()) + 1)
    begin_as_means(model, parts)
    target, staged = folder.prepared / "model", folder.prepared / "model.resized"
    shutil.rmtree(staged, ignore_errors=True)
    model.save_pretrained(
        staged, state_dict={name: weight for name, weight in model.state_dict().items() if name not in absent}
    )
    copy_text_files(path, staged)
    shutil.rmtree(target, ignore_errors=True)
    staged.rename(target)
    beyond = {token: number for token, number in new.items() if number >= before}
    if parts:
        notice(
            f"{PIECES}: {len(new)} tokens are new ({some(new)}). {len(beyond)} of them had no row in the embedding and"
            f" have one now. {begins(parts, len(new), before)}. All rows learn"
        )
    else:
        notice(
            f"{RESIZE}: {len(beyond)} tokens had no row in the embedding ({some(beyond)}). Each has one now, drawn"
            f" around the mean of the other {before:,}, and learns with them"
        )
    return target


def begins(parts: Parts, new: int, rows: int) -> str:
    """Return a sentence, without its full stop, on how the rows of `new` tokens begin, some of which have `parts`.

    `rows`: of the model before.
    """
    means = f"The rows of {len(parts)} learnt pieces begin as the mean of the rows of the tokens that they consist of"
    others = new - len(parts)
    drawn = "row of the other new token is" if others == 1 else f"rows of the {others} other new tokens are"
    return f"{means}; the {drawn} drawn around the mean of the {rows:,} before" if others else means


def begin_as_means(model: PreTrainedModel, parts: Parts) -> None:
    """Set the rows of tokens, in the embedding and in an output of its own, to the mean of the rows of their parts."""
    tables = {name: model.get_submodule(name).weight for name in token_tables(model)} if parts else {}
    for weight in tables.values():
        rows: Any = weight.data
        for number, of in parts.items():
            rows[number] = rows[list(of)].float().mean(0).to(rows.dtype)


def with_rows(model: PreTrainedModel, rows: int, drawn: bool = True) -> None:
    """Give the embedding of a loaded model, and its output, at least `rows` rows.

    `drawn`: the new ones are drawn with torch's current seed around the mean of the others, which takes seconds;
    otherwise they are not, because other values replace them.
    """
    table: Any = model.get_input_embeddings()
    output = model.get_output_embeddings()
    if output is not None and output.weight is not table.weight:
        # transformers 5.23 does not tie two weights that differ in the files, even if the configuration asks for it;
        # `resize_token_embeddings` would tie them, and PEFT believes the configuration.
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    if rows > table.num_embeddings:
        model.resize_token_embeddings(rows, mean_resizing=drawn)


# ---- adapters that hold rows


def held_by_adapter(
    beyond: Tokens,
    added: Tokens,
    config: PreTrainedConfig,
    task: str,
    field: str,
    parts: Parts = MappingProxyType({}),
) -> list[int]:
    """Return the ids of the tokens whose rows an adapter has to hold. It gives notice of them.

    `beyond`: the tokens without a row. `added`: the tokens that the job has added; some models have unused rows for
    them. `parts`: those that begin as `begin_as_means` says. Raises Failure if PEFT computes the model otherwise
    where an adapter holds rows.
    """
    model = inspect.skeleton(config, task, field)
    table: Any = model.get_input_embeddings()
    rows = table.num_embeddings
    held = {*added.values(), *range(rows, max(beyond.values(), default=-1) + 1)}
    if not held:
        return []
    biased = getattr(model.get_output_embeddings(), "bias", None) is not None
    if biased or inspect.looks_up_otherwise(table):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {len(held)} tokens are new. Where an adapter holds their rows, PEFT (0.21) would leave out"
            f" {'the bias of the logits' if biased else 'how the model finds its rows'} ({config.model_type}). Use"
            " method.type: full",
        )
    without = len(held - set(range(rows)))
    start = f". {begins(parts, len(held), rows)}" if parts else f", drawn around the mean of the other {rows:,}"
    notice(
        f"{field}: {len(held)} tokens are new ({some({**added, **beyond})}). {without} of them had no row in the"
        f" embedding and get one{start}. The rows of all {len(held)} learn, and are saved with the adapter"
    )
    return sorted(held)


def token_tables(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules with a row for each token: the embedding, and the output if it has its own."""
    table, output = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found = [names[id(table)]]
    if output is not None and output.weight is not table.weight:
        found.append(names[id(output)])
    return found


def tokens_of_adapter(adapter: Path) -> list[int]:
    """Return the ids of the tokens whose rows the adapter in a folder holds."""
    path = adapter / ADAPTER_CONFIG
    held = json.loads(path.read_text()).get("trainable_token_indices") if path.is_file() else None
    if isinstance(held, dict):
        return sorted({token for tokens in held.values() for token in tokens})
    return sorted(held or ())


def make_room(model: PreTrainedModel, adapter: Path) -> None:
    """Give a loaded model the rows that an adapter holds the values of."""
    if held := tokens_of_adapter(adapter):
        with_rows(model, max(held) + 1, drawn=False)
