"""Tokenizers of new models: each kind against the library tokenizers alone, for the tasks that can begin with one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from trainer.conftest import MakeRun
from trainer.preparing import prepared
from transformers import AutoConfig, AutoModel, AutoTokenizer

from luthier_api.run import FineTuneRun
from luthier_trainer.models.new_tokenizer import train_tokenizer
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
BERT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
T5 = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2}
READER = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ADDED = "<|im_start|>"


def plain_bpe(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|pad|>", ADDED]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return tokenizer


def plain_word_pieces(texts: Iterable[str]) -> Tokenizer:
    """The pieces within words have numbers before the training, without which it ends otherwise each time."""
    splitter = pre_tokenizers.BertPreTokenizer()
    normalizer = normalizers.BertNormalizer(lowercase=False)
    words = [w for text in texts for w, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    within = sorted({f"##{character}" for word in words for character in word[1:]})
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=[*READER, ADDED, *within])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def plain_unigrams(texts: Iterable[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>", ADDED]
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class KindCase:
    kind: Any
    task: str
    model: str
    plain: Any
    same: bool = True
    """Whether two trainings come to the same; tokenizers' Unigram goes through words in random order."""


KINDS = [
    KindCase(kind="bpe", task="causal-lm", model="llama", plain=plain_bpe),
    KindCase(kind="wordpiece", task="masked-lm", model="bert", plain=plain_word_pieces),
    KindCase(kind="unigram", task="seq2seq", model="t5", plain=plain_unigrams, same=False),
]


@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.kind)
def test_a_kind_against_the_library_alone(case: KindCase, paragraphs: list[str]) -> None:
    texts, config = paragraphs[:100], AutoConfig.for_model(case.model)
    made = train_tokenizer(texts, 400, config, case.task, case.kind, [ADDED])
    plain = case.plain(texts)
    mine = {*made.get_vocab()}
    assert len(made) == 400
    if case.same:
        assert made.get_vocab() == plain.get_vocab()
        again = train_tokenizer(texts, 400, config, case.task, case.kind, [ADDED])
        assert again.backend_tokenizer.to_str() == made.backend_tokenizer.to_str()
        for text in paragraphs[300:320]:
            assert made(text, add_special_tokens=False)["input_ids"] == plain.encode(text).ids
    else:
        assert len(mine ^ {*plain.get_vocab()}) <= 20
    assert made.tokenize(f"a {ADDED}")[-1] == ADDED


def rows(folder: Path, paragraphs: list[str], **columns: Any) -> str:
    """A file with a row for each of some paragraphs. `columns`: name → what of the paragraph, and its number."""
    path = folder / "rows.jsonl"
    lines = [json.dumps({name: of(text, i) for name, of in columns.items()}) for i, text in enumerate(paragraphs[:24])]
    path.write_text("\n".join(lines))
    return str(path)


def whole(text: str, _: int) -> str:
    return text


def first_words(text: str, _: int) -> str:
    return " ".join(text.split()[:4])


@dataclass(frozen=True)
class TaskCase:
    task: str
    columns: dict[str, Any]
    text: Any = None
    """(a row) → the text whose tokens its `input_ids` are; None: the tokens are of several texts."""
    settings: dict[str, Any] = field(default_factory=dict)


TASKS = [
    TaskCase(
        task="text-classification",
        columns={"text": whole, "label": lambda text, i: "ab"[i % 2]},
        text=lambda row: row["text"],
    ),
    TaskCase(
        task="token-classification",
        columns={"words": lambda text, i: text.split()[:9], "tags": lambda text, i: ["ab"[i % 2]] * 9},
    ),
    TaskCase(
        task="question-answering",
        columns={
            "question": first_words,
            "context": whole,
            "answers": lambda text, i: {"text": [text[:5]], "answer_start": [0]},
        },
        settings={"answering": {"stride": 8}},
    ),
    TaskCase(
        task="embedding",
        columns={"anchor": first_words, "positive": whole},
    ),
]


@pytest.mark.parametrize("case", TASKS, ids=lambda case: case.task)
def test_a_task_begins_with_a_tokenizer_of_its_rows(
    case: TaskCase, make_run: MakeRun, paragraphs: list[str], tmp_path: Path
) -> None:
    """It has as many entries as the embedding has rows, and a digest in the record."""
    path = rows(tmp_path, [p for p in paragraphs if len(p.split()) > 9], **case.columns)
    model = {
        "config": {"modelType": "bert", "parameters": BERT},
        "tokenizer": {"train": {"type": "wordpiece", "vocabSize": 300}},
    }
    run = make_run(task=case.task, model=model, dataset={"files": [path]}, method={"type": "full"}, **case.settings)
    record, data = prepared(run)
    tokenizer = AutoTokenizer.from_pretrained(record.model_path)
    table: Any = AutoModel.from_pretrained(record.model_path).get_input_embeddings()
    assert len(tokenizer) == 300 == table.num_embeddings
    assert record.model.source == "new bert"
    assert len(record.model.revision or "") == 64
    if case.text:
        given = [json.loads(line) for line in Path(path).read_text().splitlines()]
        expected = [tokenizer(case.text(row), truncation=True, max_length=64)["input_ids"] for row in given]
        assert data["train"]["input_ids"][:] == expected


def test_the_example_of_a_new_encoder_learns(
    make_run: MakeRun, corpus_rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its result has the tokenizer that was trained."""
    spec = yaml.safe_load((EXAMPLES / "finetune-new-encoder.yaml").read_text())["spec"]
    spec["model"]["config"]["parameters"] = BERT
    spec["model"]["tokenizer"]["train"]["vocabSize"] = 300
    run = make_run(
        **spec
        | {
            "dataset": {"files": [str(corpus_rows)]},
            "training": {"maxLength": 32, "batchSize": 8, "maxSteps": 3},
            "resources": {"gpusPerNode": 0},
            "volumes": [],
        }
    )
    record, _ = prepared(run)
    assert "spec.model.tokenizer: WordPiece with 300 entries, trained on the training rows" in capsys.readouterr().out
    assert (train.main(run).metrics or {})["steps"] == 3
    result = Path(run.workspace) / "result"
    trained, delivered = (json.loads((p / "tokenizer.json").read_text()) for p in (Path(record.model_path), result))
    assert delivered["model"] == trained["model"]
    assert AutoTokenizer.from_pretrained(result).mask_token == "[MASK]"


def test_a_new_t5_learns_to_write(make_run: MakeRun, paragraphs: list[str], tmp_path: Path) -> None:
    run: FineTuneRun = make_run(
        task="seq2seq",
        model={
            "config": {"modelType": "t5", "vocabSize": 300, "parameters": T5},
            "tokenizer": {"train": {"type": "unigram"}},
        },
        dataset={"files": [rows(tmp_path, paragraphs, source=whole, target=first_words)]},
        training={"maxLength": 32, "batchSize": 8, "maxSteps": 2},
        method={"type": "full"},
    )
    record, _ = prepared(run)
    config = AutoConfig.from_pretrained(record.model_path)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 1, 0)
    assert (train.main(run).metrics or {})["steps"] == 2


@dataclass(frozen=True)
class RefusedCase:
    name: str
    model: str
    texts: list[str]
    message: str


REFUSED = [
    RefusedCase(
        name="read as something else",
        model="qwen2",
        texts=["a text"],
        message="reads the tokenizer of qwen2 as a Qwen2Tokenizer, which is no WordPiece",
    ),
    RefusedCase(
        name="more characters than entries",
        model="llama",
        texts=[" ".join(chr(0x4E00 + i) for i in range(600))],
        message="the texts have so many characters that a WordPiece has 603",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_tokenizer_that_cannot_be_had_is_refused(case: RefusedCase) -> None:
    with pytest.raises(Failure, match=case.message):
        train_tokenizer(case.texts, 400, AutoConfig.for_model(case.model), "causal-lm", "wordpiece")
