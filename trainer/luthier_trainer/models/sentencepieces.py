"""A tokenizer that is a SentencePiece model alone: whether transformers reads it as SentencePiece itself does.

transformers 5.23 converts such a file. Its Llama tokenizer leaves out the file's rules of normalisation (NFKC, runs of
blanks), which Llama's own file does not have: a model that was trained with them would then be given other tokens than
it knows.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE, CONVERTED = "tokenizer.model", "tokenizer.json"
# What the usual rules change (ligatures, full-width letters, circled digits, runs of blanks, blanks at the end), and
# plain text. Not a blank at the beginning: transformers' Llama tokenizer puts no second one before it, whatever the
# rules.
PROBES = (
    "A plain sentence, with 12 words or so: it's here (and there).",
    "ﬁne ﬂour",
    "Ｆｕｌｌ ｗｉｄｔｈ",
    "① and ²",
    "two  blanks,   three",
    "a blank at the end ",
    "line\nbreak",
    "\ttab",
)


def report_differences(folder: Path, tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    """Give notice of texts that become other pieces than SentencePiece makes of them, where the folder holds
    `tokenizer.model` alone.
    """
    if not (folder / FILE).is_file() or (folder / CONVERTED).is_file():
        return
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(folder / FILE))
    except (OSError, RuntimeError):
        return  # a tiktoken vocabulary has the same name
    differing = [text for text in PROBES if pieces.encode(text, out_type=str) != tokenizer.tokenize(text)]
    if differing:
        shown = ", ".join(map(repr, differing[:3]))
        notice(
            f"{field}: of {len(PROBES)} probe texts, {len(differing)} ({shown}) become other tokens than its {FILE}"
            " says, because transformers reads such a file without all of its rules. The job and transformers tokenise"
            f" alike; if the model was trained elsewhere, add its {CONVERTED}"
        )
