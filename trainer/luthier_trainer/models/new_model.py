"""A model that starts from a configuration: a tokenizer trained on the dataset's own text, and new weights.

transformers takes any keyword for a configuration and keeps it without a word, so the names are checked here first.
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
# a token of its own: where padding is the end-of-text token, collators hide the real ones from the loss too
PADDING = "<|pad|>"
# contractions, digits, blanks and bytes: what ways of splitting texts differ in
SAMPLE = "It's 2024:\n\n\t“ünïcode” 🎻  x2 don't"
FIELD = "spec.model.config"


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, config: PreTrainedConfig | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `vocab_size` entries (special tokens included; fewer when the text has no more
    pairs).

    AutoTokenizer reads the tokenizer of some architectures (Qwen2, Qwen3.5) with a class that puts its own way of
    splitting texts in place of the saved one. So the tokenizer is trained with what AutoTokenizer makes of it beside a
    model of this `config` (None: it is read as it is saved). Raises Failure where that is no byte-level BPE.
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
    """What AutoTokenizer makes of `tokenizer` where it lies beside a model of this `config`."""
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
    """The configuration that `new` describes; sizes and ids of the tokenizer win. Raises Failure with the field's
    path.
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
    """Make weights by `seed` and save them with their configuration. Raises Failure when the model could not run."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long))  # sizes that can be built need not fit each other
    except Exception as error:  # whatever the architecture's arithmetic stumbles over
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}.parameters: the model can be built, but not run: {' '.join(str(error).split())[:500]}",
        ) from error
    model.save_pretrained(folder)


def _refuse(path: str, what: str, name: str, known: Iterable[str]) -> Failure:
    near = difflib.get_close_matches(name, list(known), 1)
    return Failure(ExitCode.INVALID_SPEC, f"{FIELD}.{path}: {what}" + (f" Did you mean {near[0]!r}?" if near else ""))
