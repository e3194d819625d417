"""Creates a model from a configuration: a tokenizer trained on the text of the dataset, and new weights.

transformers accepts any keyword for a configuration and stores it without a warning, so the names are checked here
first.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import NewModel
from luthier_trainer.models import checks, inspect
from luthier_trainer.runtime.failure import Failure

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# Padding has its own token: if it were the end-of-text token, collators would also hide the real ones from the loss.
PADDING = "<|pad|>"
# Text that differs between pre-tokenizers: contractions, digits, white space, and characters of several bytes.
SAMPLE = "It's 2024:\n\n\t“ünïcode” 🎻  x2 don't"
FIELD = "spec.model.config"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with at most `vocab_size` entries, trained on `texts`.

    The special tokens are included; there are fewer entries if the text has no more pairs. For some architectures
    (Qwen2, Qwen3.5), AutoTokenizer reads the tokenizer with a class that replaces the saved pre-tokenizer by its own.
    The tokenizer is therefore trained with the parts that AutoTokenizer gives it beside a model of this `config`.
    Without `config`, it is read as it is saved.

    Raises Failure if AutoTokenizer reads it as something else than byte-level BPE.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # An empty training creates the vocabulary of bytes, with which the tokenizer can be saved and read.
    tokenizer.train_from_iterator([], trainer)
    read = as_read(tokenizer, config).backend_tokenizer
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(read, part) is not None:
            setattr(tokenizer, part, getattr(read, part))
    tokenizer.train_from_iterator(texts, trainer)
    result = as_read(tokenizer, config)
    ids = tokenizer.encode(SAMPLE).ids
    if result(SAMPLE)["input_ids"] != ids or result.decode(ids) != SAMPLE:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}.modelType: transformers reads the tokenizer of {config.model_type if config else 'the model'} as"
            f" a {type(result).__name__}, which is no byte-level BPE: texts would be read otherwise than in training."
            " Choose another architecture, such as llama",
        )
    return result


def as_read(tokenizer: Tokenizer, config: PreTrainedConfig | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer as AutoTokenizer reads it from a folder that holds a model of this `config`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    saved = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=PADDING
    )
    if config is None:
        return saved
    with TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


def new_config(new: NewModel, tokenizer: PreTrainedTokenizerFast | None = None) -> PreTrainedConfig:
    """Return the configuration that `new` describes, with the vocabulary size and token ids of the tokenizer.

    Raises Failure with the path of the field if the architecture or a parameter is not valid.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if new.model_type not in CONFIG_MAPPING:
        raise _refuse(
            "modelType", f"transformers has no architecture {new.model_type!r}.", new.model_type, CONFIG_MAPPING.keys()
        )
    config_class: Any = CONFIG_MAPPING[new.model_type]
    if config_class not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}.modelType: {new.model_type} is not a causal language model; choose one such as llama",
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
    ids = (
        {}
        if tokenizer is None
        else {
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
    )
    try:
        config = config_class(**new.parameters, **ids)
    except Exception as error:  # each architecture checks its own arguments, with exceptions of its own
        raise Failure(ExitCode.INVALID_SPEC, f"{FIELD}.parameters: {' '.join(str(error).split())}") from error
    checks.check_looks_back(inspect.skeleton(config, "causal-lm", f"{FIELD}.parameters"), f"{FIELD}.modelType")
    return config


def save_new_model(config: PreTrainedConfig, folder: Path, seed: int) -> None:
    """Create weights with `seed` and save them with their configuration.

    Raises Failure if the model can be built but not run.
    """
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    try:
        with torch.no_grad():
            # A model can be built from sizes that do not fit each other; such a model fails when it runs.
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))
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
