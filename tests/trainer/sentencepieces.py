"""Tokenizers as SentencePiece and byte-level BPE make them, written out by hand: three ways to spell the blanks between
words.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = [chr(code) for code in range(33, 127)]
WORDS = ["an", "An", "object", "is", "on", "in", "at", "the", "er", "ing"]


def score(piece: str) -> float:
    """Long pieces are likelier than short ones, and bytes, such as `<0x0A>`, are a last resort."""
    if piece in SPECIAL:
        return 0.0
    if len(piece) == 6:
        return -100.0
    return -10.0 + len(piece)


def unigram() -> PreTrainedTokenizerFast:
    """T5's and XLNet's kind: a blank before each word, also the first; the decoder drops that of the first."""
    pieces = [*SPECIAL, *BYTES, "▁", *LETTERS, *WORDS, *[f"▁{word}" for word in (*WORDS, *LETTERS)]]
    scores = [(piece, score(piece)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return wrapped(tokenizer)


def llama() -> PreTrainedTokenizerFast:
    """Llama 2's kind: the normalizer prepends a blank to the text, the decoder strips it."""
    pieces = {piece: i for i, piece in enumerate([*SPECIAL, *BYTES, "▁", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(pieces, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return wrapped(tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: a blank is a letter like others."""
    pieces = {piece: i for i, piece in enumerate([*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(pieces, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_llama(folder: Path) -> Path:
    """Llama 2's kind in a folder."""
    llama().save_pretrained(folder)
    return folder
