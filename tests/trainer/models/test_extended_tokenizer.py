"""Pieces that the tokenizer of a trained model gets, against the libraries alone: what they are, and with which rows of
the embedding they begin.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quick import quick
from peft import AutoPeftModelForCausalLM
from prepared_workspace import save_llama
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from trainer.conftest import MakeRun
from trainer.preparing import prepared
from trainer.small_text_models import save_bert, save_t5
from trainer.tokenizers_of_kinds import KINDS
from trainer.training.test_resume import stopped_at
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun
from luthier_trainer.models.extended_tokenizer import extended
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train
from luthier_trainer.training import result

ADDED, NEW = "<|im_start|>", 30
CONFIG = LlamaConfig()


def words_of(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """The tokens of each word. Where a tokenizer takes a whole text for a word, words begin with a blank."""
    words: list[list[int]] = []
    for text in texts:
        encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        last = None
        for number, token, word in zip(encoding.ids, encoding.tokens, encoding.word_ids, strict=True):
            if number == tokenizer.unk_token_id or token.startswith("<0x"):
                last = None
                continue
            if word == last and not token.startswith("▁"):
                words[-1].append(number)
            else:
                words.append([number])
            last = word
    return words


def joined(words: list[list[int]], first: int, second: int, new: int) -> list[list[int]]:
    """The words with `new` for each pair of the two, from the left."""
    found = []
    for word in words:
        made: list[int] = []
        for number in word:
            if made and (made[-1], number) == (first, second):
                made[-1] = new
            else:
                made.append(number)
        found.append(made)
    return found


def spelled(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The piece that joins some tokens."""
    first, *others = tokenizer.convert_ids_to_tokens(ids)
    return first + "".join(token.removeprefix("##") for token in others)


@pytest.mark.parametrize("kind", KINDS)
def test_each_piece_is_the_commonest_pair_of_what_was_there(kind: str, paragraphs: list[str], tmp_path: Path) -> None:
    """Counted and joined here, one pair after the other. Old tokens keep their ids, and texts stay what they are."""
    texts = paragraphs[300:380]
    old = KINDS[kind](paragraphs[:60])
    old.add_tokens([ADDED], special_tokens=True)
    before, made = old.get_vocab(), extended(old, texts, len(old) + NEW, CONFIG)
    new = made.tokenizer
    assert new.get_vocab() == before | made.pieces
    assert [*made.pieces.values()] == [*range(len(before), len(before) + NEW)]

    words = words_of(old, texts)
    parts = {number: (number,) for number in before.values()}
    for number in made.pieces.values():
        counts = Counter(pair for word in words for pair in pairwise(word))
        for pair in [pair for pair in counts if spelled(old, [*parts[pair[0]], *parts[pair[1]]]) in before]:
            del counts[pair]  # a piece that is there, and was not read here
        best = max(counts.values())
        # Which of several that are as common is open. What they join must be what the piece consists of.
        pairs = [pair for pair, count in counts.items() if count == best]
        first, second = next(p for p in pairs if [*parts[p[0]], *parts[p[1]]] == made.parts[number])
        parts[number] = (*parts[first], *parts[second])
        words = joined(words, first, second, number)
        assert new.convert_ids_to_tokens(number) == spelled(old, made.parts[number])

    new.save_pretrained(tmp_path)
    plain, read = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(tmp_path)
    used: Counter[int] = Counter()
    for text in [*texts, *paragraphs[380:400], f"a {ADDED} b"]:
        ids = new(text, add_special_tokens=False)["input_ids"]
        used.update(ids)
        assert plain.encode(text, add_special_tokens=False).ids == ids
        assert read(text, add_special_tokens=False)["input_ids"] == ids
        was = old(text, add_special_tokens=False)["input_ids"]
        if old.backend_tokenizer.decoder is not None:
            assert new.decode(ids) == old.decode(was)
        if kind in ("byte-level", "SentencePiece BPE"):
            assert [part for number in ids for part in parts[number]] == was
    assert made.before == sum(len(old(text, add_special_tokens=False)["input_ids"]) for text in texts)
    assert (
        made.after == sum(len(new(text, add_special_tokens=False)["input_ids"]) for text in texts) < 0.97 * made.before
    )
    # Those that are not read became part of longer ones.
    assert len(used.keys() & {*made.pieces.values()}) > 0.7 * NEW


class Slow(PreTrainedTokenizerBase):
    """A tokenizer that is none of the library."""

    is_fast = False


def word_level(texts: list[str]) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "?": 1}, "?")), pad_token="?")


@dataclass(frozen=True)
class Refused:
    name: str
    tokenizer: Any
    entries: int
    message: str


REFUSED = [
    Refused(
        name="as many entries as there are",
        tokenizer=KINDS["WordPiece"],
        entries=300,
        message="spec.model.tokenizer.train.vocabSize: the tokenizer has ",
    ),
    Refused(
        name="another kind",
        tokenizer=word_level,
        entries=300,
        message="spec.model.tokenizer: the model's tokenizer is a WordLevel, and pieces can be added to BPE,",
    ),
    Refused(
        name="not of the library",
        tokenizer=lambda texts: Slow(),
        entries=300,
        message="spec.model.tokenizer: pieces can be added to the tokenizers of the library of this name, and the",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_gets_no_pieces_is_refused(case: Refused, paragraphs: list[str]) -> None:
    with pytest.raises(Failure) as failure:
        extended(case.tokenizer(paragraphs[:60]), paragraphs[:60], case.entries, CONFIG)
    assert (failure.value.code, failure.value.message.startswith(case.message)) == (ExitCode.INVALID_SPEC, True)


def test_few_texts_have_few_pairs(paragraphs: list[str]) -> None:
    made = extended(KINDS["byte-level"](paragraphs[:60]), ["qzx qzx qzx"], 5_000, CONFIG)
    assert [*made.pieces] in (["qz", "qzx", "Ġqzx"], ["zx", "qzx", "Ġqzx"], ["qz", "Ġqz", "qzx", "Ġqzx"])


# ---- jobs


@dataclass(frozen=True)
class Case:
    name: str
    task: str
    save: Any
    columns: tuple[str, ...] = ("text",)
    training: dict[str, Any] = field(default_factory=lambda: {"maxLength": 48})
    tables: int = 1
    """Matrices with a row for each token."""


CASES = [
    Case(name="a Llama with an output of its own", task="causal-lm", save=save_llama, tables=2),
    Case(name="a BERT", task="masked-lm", save=save_bert),
    Case(name="a T5", task="seq2seq", save=save_t5, columns=("source", "target")),
]


@pytest.mark.parametrize("case", quick(CASES, "a Llama with an output of its own"))
def test_a_model_that_is_trained_whole_has_rows_that_begin_as_means(
    case: Case, make_run: MakeRun, paragraphs: list[str], tmp_path: Path
) -> None:
    path = case.save(tmp_path / "model", paragraphs[:60])
    lines = [json.dumps(dict.fromkeys(case.columns, text)) + "\n" for text in paragraphs[300:340]]
    (tmp_path / "rows.jsonl").write_text("".join(lines))
    tokenizer = AutoTokenizer.from_pretrained(path)
    entries = len(tokenizer) + 20
    run = make_run(
        task=case.task,
        model={"path": str(path), "tokenizer": {"train": {"vocabSize": entries, "specialTokens": [ADDED]}}},
        method={"type": "full"},
        dataset={"files": [str(tmp_path / "rows.jsonl")]},
        training=case.training,
    )
    record, data = prepared(run)
    new = AutoTokenizer.from_pretrained(Path(run.workspace) / "prepared/processor")
    assert new(ADDED, add_special_tokens=False)["input_ids"][-1] == len(tokenizer)
    number_of = {number: token for token, number in new.get_vocab().items()}
    assert len(new) == entries

    auto = AutoModelForCausalLM if case.task == "causal-lm" else AutoModel
    was, model = (auto.from_pretrained(folder) for folder in (path, record.model_path))
    weights = [(was.get_input_embeddings().weight, model.get_input_embeddings().weight)]
    if case.tables == 2:
        weights.append((was.lm_head.weight, model.lm_head.weight))
    columns = [name for name in data["train"].column_names if name in ("input_ids", "labels")]
    assert max(i for name in columns for ids in data["train"][name] for i in ids) > len(tokenizer)
    for before, after in weights:
        assert after.shape[0] == model.config.vocab_size == entries
        assert torch.equal(after[: len(before)], before)
        for number in range(len(tokenizer) + 1, entries):
            parts = parts_of(number_of[number], tokenizer)
            torch.testing.assert_close(after[number], before[parts].mean(0))
    assert any(
        text.startswith("spec.model.tokenizer: 20 tokens are new (")
        and "begin as the mean of the rows of the tokens that they consist of; the row of the other new token is"
        in text
        for text in notices.given()
    )


def parts_of(piece: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of the old tokens that a piece consists of: the library's model reads it as a word."""
    return [token.id for token in tokenizer.backend_tokenizer.model.tokenize(piece)]


RATE = 1e-3


def with_pieces(make_run: MakeRun, name: str, llama: Path, rows: Path, entries: int) -> FineTuneRun:
    run: FineTuneRun = make_run(
        name,
        model={"path": str(llama), "tokenizer": {"train": {"vocabSize": entries}}},
        method={"type": "lora"},
        dataset={"files": [str(rows)]},
        training={"maxLength": 48, "batchSize": 8, "maxSteps": 2, "learningRate": RATE},
    )
    return run


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    was = model.training
    found: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).logits[0].float()
    model.train(was)
    return found


def test_an_adapter_holds_the_rows_of_pieces(
    make_run: MakeRun, llama: Path, corpus_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain PEFT gives the logits that were trained. The rows of pieces begin as means, and learn."""
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows, entries = len(tokenizer), len(tokenizer) + 20
    ids = [rows, 5, rows + 3, entries - 1]
    trained: list[torch.Tensor] = []
    write = result.write

    def listening(loop: Any, *arguments: Any) -> None:
        trained.append(logits(loop.model, ids))
        write(loop, *arguments)

    monkeypatch.setattr(result, "write", listening)
    run = with_pieces(make_run, "job", llama, corpus_rows, entries)
    record, _ = prepared(run)
    assert record.new_tokens == [*range(rows, entries)]
    assert train.main(run).code == 0
    adapter = tmp_path / "workspace/job/result"
    saved = load_file(adapter / "adapter_model.safetensors")
    assert record.plan.trainable_parameters == sum(weight.numel() for weight in saved.values())
    assert {tuple(weight.shape) for name, weight in saved.items() if "token_adapter" in name} == {(20, 64)}

    model = AutoPeftModelForCausalLM.from_pretrained(adapter)
    new = AutoTokenizer.from_pretrained(adapter)
    assert len(new) == entries == len(model.get_base_model().get_input_embeddings().weight)
    torch.testing.assert_close(logits(model, ids), trained[0])

    # Adam moves a number by the rate in a step at most, which is less than the way to any other beginning.
    base = AutoModelForCausalLM.from_pretrained(llama)
    table = base.model.embed_tokens.weight
    means = torch.stack(
        [table[parts_of(new.convert_ids_to_tokens(i), tokenizer)].mean(0) for i in range(rows, entries)]
    )
    held = model.base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta["default"]
    moved = (held - means).abs().amax(1)
    assert moved.max() < 2.1 * RATE < (means - table.mean(0)).abs().amax(1).min()
    assert (moved > 0.1 * RATE).sum() > 5


@pytest.mark.slow
def test_an_attempt_that_resumes_learns_the_same_pieces(
    make_run: MakeRun, llama: Path, corpus_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt = []
    for name, stops in (("whole", False), ("stopped", True)):
        run = with_pieces(make_run, name, llama, corpus_rows, 532)
        prepare(run)
        if stops:
            assert stopped_at(run, 1, monkeypatch).code == 75
        assert train.main(run).code == 0
        folder = tmp_path / "workspace" / name / "result"
        learnt.append((load_file(folder / "adapter_model.safetensors"), (folder / "tokenizer.json").read_text()))
    (whole, tokenizer), (resumed, again) = learnt
    assert tokenizer == again
    assert {name for name, weight in whole.items() if not torch.equal(weight, resumed[name])} == set()
