"""Small tokenizers of each kind that models have, trained on real text."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from luthier_trainer.models.new_tokenizer import train_tokenizer

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
SPECIAL = [UNKNOWN, BEGIN, END]


def byte_level(texts: list[str]) -> PreTrainedTokenizerBase:
    """GPT-2, Llama 3, Qwen: words are told apart by a regular expression, blanks belong to the word after them."""
    return train_tokenizer(texts, 2000)


def sentencepiece_bpe(texts: list[str]) -> PreTrainedTokenizerBase:
    """Llama 2, Mistral, Gemma: the whole text is one word, with a blank before it and `<s>` before that."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = [word for text in texts for word in text.replace("\n", "\n ").split(" ")]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=2000, special_tokens=SPECIAL + bytes_, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 1)])
    return _named(tokenizer)


def unigram(texts: list[str]) -> PreTrainedTokenizerBase:
    """T5, XLM-RoBERTa, XLNet, ALBERT: the most likely pieces of each word; control tokens are pieces like all
    others.
    """
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=1000, special_tokens=SPECIAL, unk_token=UNKNOWN, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return _named(tokenizer)


def word_piece(texts: list[str]) -> PreTrainedTokenizerBase:
    """BERT: words without blanks, line breaks and capitals."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=2000, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A {END}", special_tokens=[(BEGIN, 1), (END, 2)]
    )
    return _named(tokenizer)


KINDS: dict[str, Callable[[list[str]], PreTrainedTokenizerBase]] = {
    "byte-level": byte_level,
    "SentencePiece BPE": sentencepiece_bpe,
    "Unigram": unigram,
    "WordPiece": word_piece,
}


def _named(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, unk_token=UNKNOWN, pad_token=END
    )
