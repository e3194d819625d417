"""Checks whether transformers reads a tokenizer that is only a SentencePiece model as SentencePiece itself does.

transformers 5.23 converts such a file. Its Llama tokenizer leaves out the normalisation rules in the file (NFKC, runs
of blanks). Llama's own file has no such rules, but a model that was trained with them would then be given other tokens
than in its training.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from luthier_trainer.runtime.notices import notice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE, CONVERTED = "tokenizer.model", "tokenizer.json"
# Texts that the usual rules change (ligatures, full-width letters, circled digits, runs of blanks, blanks at the end),
# and plain text. No text begins with a blank: transformers' Llama tokenizer does not add a second blank before it,
# whatever the rules are.
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
    """Give notice if probe texts become other tokens than SentencePiece makes of them.

    Only a folder that holds `tokenizer.model` and no `tokenizer.json` is checked.
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
