"""A folder as Llama 2's authors published it: the tokenizer is a SentencePiece model alone, without tokenizer.json."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from trainer.conftest import MakeRun
from trainer.preparing import prepared
from transformers import AutoModelForCausalLM

from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models.processors import read_tokenizer
from luthier_trainer.runtime import notices

BEGIN, END = 1, 2


def trained(paragraphs: list[str], **rules: Any) -> bytes:
    """A SentencePiece model of 512 pieces, as a file holds it."""
    written = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(paragraphs[:100]).splitlines()),
        model_writer=written,
        vocab_size=512,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        minloglevel=2,
        **rules,
    )
    return written.getvalue()


def save_tokenizer(folder: Path, model: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(model)
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | special))


@dataclass(frozen=True)
class Case:
    name: str
    rules: dict[str, Any]
    differs: bool


RULES = [
    Case(
        name="Llama's",
        rules={"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        differs=False,
    ),
    Case(
        name="SentencePiece's own",
        rules={},
        differs=True,
    ),
]


@pytest.mark.parametrize("case", RULES, ids=lambda case: case.name)
def test_rules_that_transformers_leaves_out_are_noticed(case: Case, paragraphs: list[str], tmp_path: Path) -> None:
    save_tokenizer(tmp_path, trained(paragraphs, **case.rules))
    read_tokenizer(tmp_path, "spec.model.path")
    assert [text.partition(" (")[0] for text in notices.given()] == [
        "spec.model.path: of 8 probe texts, 7"
    ] * case.differs


def test_a_tokenizer_that_is_a_sentencepiece_model_alone(
    make_run: MakeRun, tiny_model: Path, paragraphs: list[str], corpus_rows: Path, tmp_path: Path
) -> None:
    """The rows are what SentencePiece itself makes of the texts, and the saved tokenizer makes the same of them."""
    written = trained(paragraphs, normalization_rule_name="identity", remove_extra_whitespaces=False)
    folder = tmp_path / "llama-2"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(tiny_model / name, folder / name)
    save_tokenizer(folder, written)

    pieces = SentencePieceProcessor(model_proto=written)
    run = make_run(model={"path": str(folder)}, training={"maxLength": 256, "batchSize": 4})
    record, data = prepared(run)
    saved = read_tokenizer(WorkspaceFolder(Path(run.workspace)).prepared / "processor", "spec.model")
    model = AutoModelForCausalLM.from_pretrained(record.model_path)
    rows = [json.loads(line)["text"] for line in corpus_rows.read_text().splitlines()[:50]]
    for text, row in zip(rows, data["train"], strict=False):
        expected = [BEGIN, *pieces.encode(text)]
        assert row["input_ids"][:200] == [*expected, END][:200]
        assert saved(text)["input_ids"] == expected
    assert model(**saved(rows[0], return_tensors="pt")).logits.isfinite().all()
