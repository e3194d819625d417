"""Trains tokenizers for new models, with the library tokenizers, on the texts of the dataset.

Each kind of tokenizer is a row of `KINDS`. Which control tokens it has depends on the model's class (`CONTROLS`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from luthier_api.exitcodes import ExitCode
from luthier_api.spec import TokenizerType
from luthier_api.tasks import TASKS
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
SIZE = "spec.model.tokenizer.train.vocabSize"
PARTS = ("normalizer", "pre_tokenizer", "decoder")
CHARACTERS = 0x110000  # of Unicode. tokenizers would leave all but 1,000 out of WordPiece, and say nothing
WITHIN = "##"  # before a piece of WordPiece that does not begin a word


@dataclass(frozen=True)
class Controls:
    """The control tokens of a new tokenizer."""

    roles: Mapping[str, str]
    """transformers' name of a role → the token, in the order of ids; several roles may share one."""
    single: str | None = None
    """What is put around a text, as tokenizers' TemplateProcessing writes it; None: nothing."""
    pair: str | None = None
    """The same for two texts."""

    def tokens(self, needs_unknown: bool) -> list[str]:
        """Return the tokens in the order of ids. `needs_unknown`: the kind cannot spell every character."""
        tokens = [token for role, token in self.roles.items() if needs_unknown or role != UNKNOWN]
        return list(dict.fromkeys(tokens))


UNKNOWN = "unk_token"
CONTROLS: Mapping[str, Controls] = {
    "CausalLM": Controls(
        roles={"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": PADDING, UNKNOWN: "<|unknown|>"},
    ),
    "Seq2SeqLM": Controls(
        roles={"pad_token": "<pad>", "eos_token": "</s>", UNKNOWN: "<unk>"},
        single="$A </s>",
        pair="$A </s> $B </s>",
    ),
}
"""Name of transformers' class for a task (`TaskInfo.auto_model`) → its control tokens."""
READER = Controls(
    roles={
        "pad_token": "[PAD]",
        UNKNOWN: "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    },
    single="[CLS] $A [SEP]",
    pair="[CLS] $A [SEP] $B:1 [SEP]:1",
)
"""Those of all other classes, which read a text as BERT does."""


@dataclass(frozen=True)
class Kind:
    """A kind of tokenizer."""

    title: str
    lossless: bool
    """Whether each text can be written again from its tokens. Such a kind needs no token for unknown characters."""
    begin: Callable[[str], Tokenizer]
    """Token for unknown characters → a tokenizer without a vocabulary."""
    learn: Callable[[Tokenizer, Iterable[str], int, Sequence[str], str], Tokenizer]
    """(tokenizer, texts, entries, control tokens, token for unknown characters) → the trained tokenizer.

    The texts may be read several times.
    """
    notice: str = ""
    """What is to be told about each training."""


def _byte_pairs(unknown: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _learn_byte_pairs(
    tokenizer: Tokenizer, texts: Iterable[str], size: int, special: Sequence[str], unknown: str
) -> Tokenizer:
    from tokenizers import pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _word_pieces(unknown: str) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece(unk_token=unknown))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _learn_word_pieces(
    tokenizer: Tokenizer, texts: Iterable[str], size: int, special: Sequence[str], unknown: str
) -> Tokenizer:
    """Train twice. tokenizers 0.23 numbers characters within words in the order of a hash map, which differs each time,
    and the numbers decide which of two equally frequent pairs is merged. So the first training finds these characters,
    and the second one gets them in order, as tokens that have their numbers already.
    """
    from tokenizers import Tokenizer, models, trainers

    def train(entries: int, known: Sequence[str]) -> dict[str, int]:
        trainer = trainers.WordPieceTrainer(
            vocab_size=entries, special_tokens=[*special, *known], limit_alphabet=CHARACTERS, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return dict(tokenizer.get_vocab())

    within = sorted(token for token in train(1, []) if token.startswith(WITHIN) and token not in special)
    learnt = Tokenizer(models.WordPiece(vocab=train(size, within), unk_token=unknown))
    for part in PARTS:
        if getattr(tokenizer, part) is not None:
            setattr(learnt, part, getattr(tokenizer, part))
    learnt.add_special_tokens([*special])
    return learnt


def _unigrams(unknown: str) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def _learn_unigrams(
    tokenizer: Tokenizer, texts: Iterable[str], size: int, special: Sequence[str], unknown: str
) -> Tokenizer:
    from tokenizers import trainers

    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=[*special], unk_token=unknown, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


KINDS: Mapping[TokenizerType, Kind] = {
    "bpe": Kind(title="byte-level BPE", lossless=True, begin=_byte_pairs, learn=_learn_byte_pairs),
    "wordpiece": Kind(title="WordPiece", lossless=False, begin=_word_pieces, learn=_learn_word_pieces),
    "unigram": Kind(
        title="Unigram",
        lossless=False,
        begin=_unigrams,
        learn=_learn_unigrams,
        notice=". Another training over the same rows may order pieces otherwise, because tokenizers (0.23) goes"
        " through words in random order",
    ),
}


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    config: PreTrainedConfig | None = None,
    task: str = "causal-lm",
    kind: TokenizerType = "bpe",
    special_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """Return a tokenizer with at most `vocab_size` entries, trained on `texts`.

    The control tokens of `task` and `special_tokens` are included; there are fewer entries if the text has no more
    pieces. For some architectures (Qwen2, Qwen3.5), AutoTokenizer reads the tokenizer with a class that replaces the
    saved pre-tokenizer by its own. The tokenizer is therefore trained with the parts that AutoTokenizer gives it beside
    a model of this `config`. Without `config`, it is read as it is saved.

    Raises Failure if AutoTokenizer reads it as something else.
    """
    from tokenizers import processors

    made, controls = KINDS[kind], CONTROLS.get(TASKS[task].auto_model or "", READER)
    special = list(dict.fromkeys([*controls.tokens(not made.lossless), *special_tokens]))
    roles = {role: token for role, token in controls.roles.items() if token in special}
    unknown = controls.roles[UNKNOWN]
    # An empty training creates the vocabulary of the alphabet, with which the tokenizer can be saved and read.
    begun = made.learn(made.begin(unknown), [], vocab_size, special, unknown)
    read = as_read(begun, roles, config).backend_tokenizer
    tokenizer = made.begin(unknown)
    for part in PARTS:
        if getattr(read, part) is not None:
            setattr(tokenizer, part, getattr(read, part))
    tokenizer = made.learn(tokenizer, texts, vocab_size, special, unknown)
    if tokenizer.get_vocab_size() > vocab_size:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{SIZE}: the texts have so many characters that a {made.title} has {tokenizer.get_vocab_size():,} entries"
            f" at least, and {vocab_size:,} are asked for; raise it, or use type: bpe, which reads bytes",
        )
    if controls.single:
        around = [(token, tokenizer.token_to_id(token)) for token in special if token in controls.single.split()]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=controls.single, pair=controls.pair, special_tokens=around
        )
    result = as_read(tokenizer, roles, config)
    ids = tokenizer.encode(SAMPLE).ids
    written = result.decode(ids, skip_special_tokens=True)
    if result(SAMPLE)["input_ids"] != ids or (made.lossless and written != SAMPLE):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{FIELD}.modelType: transformers reads the tokenizer of {config.model_type if config else 'the model'} as"
            f" a {type(result).__name__}, which is no {made.title}: texts would be read otherwise than in training."
            " Choose another architecture, such as llama, or another model.tokenizer.train.type",
        )
    return result


def as_read(tokenizer: Tokenizer, roles: Mapping[str, str], config: PreTrainedConfig | None) -> PreTrainedTokenizerFast:
    """Return the tokenizer as AutoTokenizer reads it from a folder that holds a model of this `config`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    if config is None:
        return saved
    with TemporaryDirectory() as folder:
        saved.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False)


def describe(tokenizer: PreTrainedTokenizerFast, kind: TokenizerType, wanted: int, digest: str) -> str:
    """Return a text, for a notice, on a tokenizer that was trained. `wanted`: entries that the job asks for."""
    few = f", because the texts have no more pieces than these ({wanted:,} were asked for)"
    return (
        f"spec.model.tokenizer: {KINDS[kind].title} with {len(tokenizer):,} entries, trained on the training rows"
        f"{few if len(tokenizer) < wanted else ''} (SHA-256 {digest}){KINDS[kind].notice}"
    )
