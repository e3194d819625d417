"""Creates a model from a configuration, with new weights. `new_tokenizer` makes its tokenizer.

transformers accepts any keyword for a configuration and stores it without a warning, so the names are checked here
first.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import NewModel
from luthier_api.tasks import TASKS
from luthier_trainer.models import checks, inspect
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

FIELD = "spec.model.config"


EXAMPLES = {"CausalLM": "llama", "Seq2SeqLM": "t5"}
"""transformers' class of a task → an architecture that has it. bert has all others."""


def new_config(
    new: NewModel, tokenizer: PreTrainedTokenizerFast | None = None, task: str = "causal-lm"
) -> PreTrainedConfig:
    """Return the configuration that `new` describes, with the vocabulary size and token ids of the tokenizer.

    Raises Failure with the path of the field if the architecture or a parameter is not valid.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = TASKS[task].auto_model or ""
    if new.model_type not in CONFIG_MAPPING:
        raise _refuse(
            "modelType", f"transformers has no architecture {new.model_type!r}.", new.model_type, CONFIG_MAPPING.keys()
        )
    config_class: Any = CONFIG_MAPPING[new.model_type]
    if config_class not in inspect.auto_class(task)._model_mapping:
        what = "is not a causal language model" if kind == "CausalLM" else f"cannot do {task}"
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}.modelType: {new.model_type} {what}; choose one such as {EXAMPLES.get(kind, 'bert')}",
        )
    known = {f.name for f in fields(config_class)} | set(config_class.attribute_map)
    for name in new.parameters:
        if name == "vocab_size":
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{FIELD}.parameters.vocab_size: the tokenizer sets it; use model.config.vocabSize",
            )
        if name not in known:
            raise _refuse(
                f"parameters.{name}", f"the configuration of {new.model_type} has no such field.", name, known
            )
    ids = {} if tokenizer is None else token_ids(tokenizer, kind, known)
    try:
        config = config_class(**new.parameters, **ids)
    except Exception as error:  # each architecture checks its own arguments, with exceptions of its own
        raise Failure(ExitCode.INVALID_SPEC, f"{FIELD}.parameters: {' '.join(str(error).split())}") from error
    model = inspect.skeleton(config, task, f"{FIELD}.parameters")
    if kind == "CausalLM":
        checks.check_looks_back(model, f"{FIELD}.modelType")
    return config


def token_ids(tokenizer: PreTrainedTokenizerFast, kind: str, known: Collection[str]) -> dict[str, int]:
    """Return the fields of a configuration that follow from the tokenizer. `known`: those that it can have.

    A text of a reader begins with its classification token and ends with a separator. A decoder begins with padding, as
    that of T5.
    """
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
    if kind == "Seq2SeqLM":
        ids |= {"decoder_start_token_id": tokenizer.pad_token_id}
        ids |= {"forced_eos_token_id": end} if "forced_eos_token_id" in known else {}
    return {"vocab_size": len(tokenizer)} | {name: number for name, number in ids.items() if number is not None}


def save_new_model(config: PreTrainedConfig, folder: Path, seed: int, task: str = "causal-lm") -> None:
    """Create weights with `seed` and save them with their configuration.

    Raises Failure if the model can be built but not run.
    """
    import torch
    from transformers import set_seed

    set_seed(seed)
    model = inspect.auto_class(task).from_config(config)
    ids = torch.zeros(1, 2, dtype=torch.long)
    given = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    try:
        with torch.no_grad():
            # A model can be built from sizes that do not fit each other; such a model fails when it runs.
            model.eval()(**given)
    except Exception as error:  # the exception depends on the architecture
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}.parameters: the model can be built, but not run: {' '.join(str(error).split())[:500]}",
        ) from error
    model.save_pretrained(folder)


def _refuse(path: str, what: str, name: str, known: Iterable[str]) -> Failure:
    """Return the Failure for a name that is not among `known`, with a suggestion if one is similar."""
    near = difflib.get_close_matches(name, list(known), 1)
    return Failure(ExitCode.INVALID_SPEC, f"{FIELD}.{path}: {what}" + (f" Did you mean {near[0]!r}?" if near else ""))
