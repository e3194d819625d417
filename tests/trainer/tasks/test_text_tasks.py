"""The tasks that read texts, from rows to the result: what a training reports is what the library alone computes.

Each result is loaded by transformers, and PEFT where it is an adapter, and asked about the held-out rows by code that
shares nothing with ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import pandas
import pytest
import torch
import transformers
import yaml
from cases.quick import quick
from datasets import load_from_disk
from peft import PeftModel
from prepared_workspace import losses
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score
from trainer.small_text_models import save_bert, save_t5
from trainer.tasks.stopping import stopped_at
from transformers import AutoConfig, AutoTokenizer, BartConfig, BartForConditionalGeneration

from luthier_api.run import FineTuneRun
from luthier_api.texts import Masking
from luthier_trainer.prepare import main as prepare
from luthier_trainer.publish.model_card import card
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.tasks.masked_lm import ALONE, MASKED, Masker
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
HELD_OUT = 10

SMALL_BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 64}

Row = dict[str, Any]
Measured = dict[str, float]


@pytest.fixture(scope="module")
def texts(paragraphs: list[str]) -> list[str]:
    """Sentences of 6 to 14 words."""
    return [" ".join(words[:14]) for text in paragraphs if len(words := text.split()) > 5][:400]


@pytest.fixture(scope="module")
def bert(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return save_bert(tmp_path_factory.mktemp("models") / "bert", texts)


@pytest.fixture(scope="module")
def t5(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    return save_t5(tmp_path_factory.mktemp("models") / "t5", texts)


# ---- rows


def of_targets(text: str) -> Row:
    return {"source": text, "target": f"it is about the {text.split()[1]}"}


def of_words(text: str) -> Row:
    """A word that begins with a capital is a name; the next such one belongs to it."""
    words, tags = text.split(), list[str]()
    for word in words:
        inside = bool(tags) and tags[-1] != "O"
        tags.append(("I-NAME" if inside else "B-NAME") if word[0].isupper() else "O")
    return {"words": words, "tags": tags}


def of_questions(text: str) -> Row:
    """What follows the second word? Texts with a comma have no answer."""
    words = text.split()
    begin = len(" ".join(words[:2])) + 1
    answers = {"text": [words[2]], "answer_start": [begin]}
    if "," in text:
        answers = {"text": [], "answer_start": []}
    return {"question": f"what follows {words[1]}?", "context": f"{text} {text}", "answers": answers}


def of_labels(text: str) -> Row:
    return {"text": text, "label": [word for word in ("the", "is", "a") if word in text.split()]}


def of_numbers(text: str) -> Row:
    return {"text": text, "label": len(text) / 40}


def of_class(text: str) -> Row:
    return {"text": text, "label": "code" if "(" in text else "prose"}


def of_text(text: str) -> Row:
    return {"text": text}


def of_triplets(text: str) -> Row:
    words = text.split()
    return {"anchor": " ".join(words[:5]), "positive": " ".join(words[3:8]), "negative": " ".join(words[::-1])}


# ---- what the library alone says of held-out rows


def loaded(auto: str, run: FineTuneRun, base: Path) -> Any:
    """The result as its model card says; in fp32, and ready for questions."""
    result = Path(run.workspace) / "result"
    kind = getattr(transformers, auto)
    if not (result / "adapter_config.json").exists():
        return kind.from_pretrained(result).eval()
    config = AutoConfig.from_pretrained(result if (result / "config.json").exists() else base)
    model = kind.from_pretrained(base, config=config, ignore_mismatched_sizes=True)
    return PeftModel.from_pretrained(model, result).eval()


def seq2seq(run: FineTuneRun, rows: list[Row], base: Path) -> Measured:
    from sacrebleu import corpus_bleu

    model, tokenizer = (
        loaded("AutoModelForSeq2SeqLM", run, base),
        AutoTokenizer.from_pretrained(Path(run.workspace) / "result"),
    )
    loss = tokens = 0.0
    written = []
    for row in rows:
        batch = tokenizer("go: " + row["source"], text_target=row["target"], return_tensors="pt")
        batch.pop("token_type_ids", None)
        labels = batch["labels"].numel()
        loss, tokens = loss + model(**batch).loss.item() * labels, tokens + labels
        ids = batch["input_ids"]
        made = model.generate(input_ids=ids, num_beams=2, do_sample=False, max_new_tokens=20)
        written.append(tokenizer.decode(made[0], skip_special_tokens=True))
    references = [row["target"] for row in rows]
    return {
        "evalLoss": loss / tokens,
        "bleu": corpus_bleu(written, [references]).score,
        "exactMatch": sum(a == b for a, b in zip(written, references, strict=True)) / len(rows),
    }


def tagged(run: FineTuneRun, rows: list[Row], base: Path) -> Measured:
    model, tokenizer = loaded("AutoModelForTokenClassification", run, base), AutoTokenizer.from_pretrained(base)
    names, loss, right, words = model.config.id2label, 0.0, 0, 0
    found = wanted = both = 0
    for row in rows:
        read = tokenizer(row["words"], is_split_into_words=True, return_tensors="pt")
        logits = model(**read).logits[0]
        firsts = [read.word_to_tokens(i).start for i in range(len(row["words"]))]
        truth = torch.tensor([model.config.label2id[tag] for tag in row["tags"]])
        loss += torch.nn.functional.cross_entropy(logits[firsts], truth, reduction="sum").item()
        answers = [names[i] for i in logits[firsts].argmax(dim=-1).tolist()]
        right, words = right + sum(a == b for a, b in zip(answers, row["tags"], strict=True)), words + len(answers)
        given, true = entities(answers), entities(row["tags"])
        found, wanted, both = found + len(given), wanted + len(true), both + len(given & true)
    f1 = 2 * both / (found + wanted) if both else 0.0
    return {"evalLoss": loss / words, "accuracy": right / words, "f1": f1, "recall": both / wanted}


def entities(tags: list[str]) -> set[tuple[int, int]]:
    """First and last word of runs of one type that a B- tag does not divide."""
    starts = [i for i, tag in enumerate(tags) if tag != "O" and (tag[0] == "B" or i == 0 or tags[i - 1] == "O")]
    return {(i, next((j for j in range(i + 1, len(tags)) if tags[j][0] != "I"), len(tags)) - 1) for i in starts}


def answered(run: FineTuneRun, rows: list[Row], base: Path) -> Measured:
    """One window after another, and each pair of tokens in it."""
    model, tokenizer = loaded("AutoModelForQuestionAnswering", run, base), AutoTokenizer.from_pretrained(base)
    exact, losses_of_windows = 0, []
    for row in rows:
        read = tokenizer(
            row["question"],
            row["context"],
            truncation="only_second",
            max_length=48,
            stride=8,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        best, none = (-1e9, ""), 1e9
        for i, ids in enumerate(read["input_ids"]):
            inputs = {name: torch.tensor([read[name][i]]) for name in tokenizer.model_input_names}
            edges = torch.tensor([edges_of(read, i, row)])
            outputs = model(**inputs, start_positions=edges[:, 0], end_positions=edges[:, 1])
            losses_of_windows.append(outputs.loss.item())
            start, end = outputs.start_logits[0].tolist(), outputs.end_logits[0].tolist()
            none = min(none, start[0] + end[0])
            places = [j for j in range(len(ids)) if read.sequence_ids(i)[j] == 1]
            for a in places:
                for b in [b for b in places if a <= b < a + 3]:
                    spans = read["offset_mapping"][i]
                    best = max(best, (start[a] + end[b], row["context"][spans[a][0] : spans[b][1]]))
        answer = "" if none > best[0] else best[1]
        true = row["answers"]["text"][0] if row["answers"]["text"] else ""
        exact += answer.strip(".,:()").lower() == true.strip(".,:()").lower()
    return {"evalLoss": sum(losses_of_windows) / len(losses_of_windows), "exactMatch": exact / len(rows)}


def edges_of(read: Any, window: int, row: Row) -> tuple[int, int]:
    """The tokens of the answer, if the window has all of it; else those of [CLS]."""
    if not row["answers"]["text"]:
        return 0, 0
    begin = row["answers"]["answer_start"][0]
    first = read.char_to_token(window, begin, sequence_index=1)
    last = read.char_to_token(window, begin + len(row["answers"]["text"][0]) - 1, sequence_index=1)
    return (0, 0) if first is None or last is None else (first, last)


def logits_of(run: FineTuneRun, rows: list[Row], base: Path) -> tuple[Any, torch.Tensor]:
    model, tokenizer = loaded("AutoModelForSequenceClassification", run, base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return model, torch.cat([model(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows])


def several(run: FineTuneRun, rows: list[Row], base: Path) -> Measured:
    model, logits = logits_of(run, rows, base)
    assert model.config.problem_type == "multi_label_classification"
    names = [model.config.id2label[i] for i in range(3)]
    truth = torch.tensor([[float(name in row["label"]) for name in names] for row in rows])
    chosen = (logits.sigmoid() > 0.5).numpy()
    return {
        "evalLoss": torch.nn.BCEWithLogitsLoss()(logits, truth).item(),
        "accuracy": accuracy_score(truth, chosen),
        "f1Micro": f1_score(truth, chosen, average="micro", zero_division=0),
        "f1Macro": f1_score(truth, chosen, average="macro", zero_division=0),
    }


def numbers(run: FineTuneRun, rows: list[Row], base: Path) -> Measured:
    model, logits = logits_of(run, rows, base)
    assert model.config.problem_type == "regression"
    assert model.config.num_labels == 1
    truth = torch.tensor([row["label"] for row in rows])
    squared = ((logits[:, 0] - truth) ** 2).mean().item()
    correlation = pearsonr(logits[:, 0].numpy(), truth.numpy()).statistic
    return {"evalLoss": squared, "mse": squared, "pearson": float(correlation)}


def weighted(run: FineTuneRun, rows: list[Row], base: Path) -> Measured:
    model, logits = logits_of(run, rows, base)
    truth = torch.tensor([model.config.label2id[row["label"]] for row in rows])
    return {
        "evalLoss": torch.nn.functional.cross_entropy(logits, truth).item(),
        "accuracy": accuracy_score(truth, logits.argmax(dim=1)),
    }


def ranked(run: FineTuneRun, rows: list[Row], base: Path) -> Measured:
    """As sentence-transformers' MultipleNegativesRankingLoss is defined: cos × 20, and the own partner is the class."""
    model, tokenizer = loaded("AutoModel", run, base), AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        found = {
            role: torch.stack(
                [model(**tokenizer(row[role], return_tensors="pt")).last_hidden_state[0].mean(0) for row in rows]
            )
            for role in ("anchor", "positive", "negative")
        }
    total = 0.0
    for at in range(0, len(rows), 8):
        block = slice(at, at + 8)
        others = torch.cat([found["positive"][block], found["negative"][block]])
        scores = torch.nn.functional.cosine_similarity(found["anchor"][block, None], others[None], dim=-1) * 20
        total += torch.nn.functional.cross_entropy(scores, torch.arange(len(scores)), reduction="sum").item()
    every = torch.nn.functional.cosine_similarity(found["anchor"][:, None], found["positive"][None], dim=-1)
    places = [(line >= line[i]).sum().item() for i, line in enumerate(every)]
    return {"evalLoss": total / len(rows), "mrr": sum(1 / place for place in places) / len(places)}


@dataclass(frozen=True)
class Case:
    name: str
    example: str
    """The manifest that is run, made short."""
    rows: Callable[[str], Row]
    """A row by the roles of its columns."""
    check: Callable[[FineTuneRun, list[Row], Path], Measured]
    model: str = "bert"
    changes: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case(
        name="seq2seq, by beams",
        example="finetune-summaries.yaml",
        rows=of_targets,
        check=seq2seq,
        model="t5",
        changes={"seq2seq": {"prefix": "go: ", "beams": 2, "maxTargetLength": 20}},
        training={"maxSteps": 16, "learningRate": 1e-2},
    ),
    Case(
        name="token-classification",
        example="finetune-entities.yaml",
        rows=of_words,
        check=tagged,
    ),
    Case(
        name="question-answering in windows",
        example="finetune-questions.yaml",
        rows=of_questions,
        check=answered,
        changes={"answering": {"stride": 8, "maxAnswerLength": 3}},
        training={"maxLength": 48},
    ),
    Case(
        name="several labels",
        example="finetune-topics.yaml",
        rows=of_labels,
        check=several,
    ),
    Case(
        name="numbers",
        example="finetune-ratings.yaml",
        rows=of_numbers,
        check=numbers,
    ),
    Case(
        name="classes that count alike",
        example="finetune-classifier.yaml",
        rows=of_class,
        check=weighted,
    ),
    Case(
        name="embedding",
        example="finetune-embedding.yaml",
        rows=of_triplets,
        check=ranked,
    ),
]


Tune = Callable[..., tuple[FineTuneRun, list[Row]]]


@pytest.fixture
def tune(make_run: Any, tmp_path: Path, texts: list[str], bert: Path, t5: Path) -> Tune:
    """The run config of a case, and its held-out rows."""
    folders = {"bert": bert, "t5": t5}

    def make(case: Case, name: str = "job", **training: Any) -> tuple[FineTuneRun, list[Row]]:
        spec = yaml.safe_load((EXAMPLES / case.example).read_text())["spec"]
        columns = spec["dataset"].get("columns", {})
        rows = [case.rows(text) for text in texts[:42]]
        dataset: dict[str, Any] = {"columns": columns}
        for role, some in (("files", rows[HELD_OUT:]), ("evalFiles", rows[:HELD_OUT])):
            file = tmp_path / f"{name}-{role}.jsonl"
            lines = [{columns.get(key, key): value for key, value in row.items()} for row in some]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))
            dataset[role] = [str(file)]
        course = {"maxLength": 64, "batchSize": 8, "maxSteps": 6, "learningRate": 3e-3, "logSteps": 1} | case.training
        short = {"model": {"path": str(folders[case.model])}, "dataset": dataset, "resources": {"gpusPerNode": 0}}
        return make_run(name, **spec | short | case.changes | {"training": course | training}), rows[:HELD_OUT]

    return make


@pytest.mark.parametrize(
    "case", quick(CASES, "seq2seq, by beams", "question-answering in windows", "several labels", "numbers")
)
def test_a_result_answers_as_was_measured(case: Case, tune: Tune, bert: Path, t5: Path) -> None:
    run, rows = tune(case)
    prepare.main(run)
    metrics = train.main(run).metrics
    assert metrics is not None
    with torch.no_grad():
        expected = case.check(run, rows, {"bert": bert, "t5": t5}[case.model])
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, abs=2e-4)
    assert metrics["evalLoss"] != metrics["evalLossBefore"]
    page = card(run, read_prepared(run), Path(run.workspace) / "result")
    assert f"| Task | {run.spec.task} |" in page


MASKED_CASE = Case(name="masked words", example="finetune-domain.yaml", rows=of_text, check=seq2seq)


def test_masks_follow_from_seed_step_and_row(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped run goes on with the masks, and so with the losses, of one that was not stopped."""
    whole, _ = tune(MASKED_CASE, "whole", saveSteps=2, evalSteps=3)
    prepare.main(whole)
    expected = train.main(whole).metrics
    stopped, _ = tune(MASKED_CASE, "stopped", saveSteps=2, evalSteps=3)
    prepare.main(stopped)
    assert stopped_at(stopped, 3, monkeypatch).code == 75
    assert train.main(stopped).metrics is not None
    assert losses(stopped) == losses(whole)
    assert expected is not None
    assert expected["evalLoss"] < expected["evalLossBefore"]
    assert expected["perplexity"] == pytest.approx(math.exp(expected["evalLoss"]))


def test_the_loss_of_masked_words_is_what_the_library_computes(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the held-out batches as they were masked. Each is its row, but for masked words."""
    batches: list[dict[str, torch.Tensor]] = []
    masks = Masker.__call__

    def noted(masker: Masker, batch: Any, step: int | None) -> Any:
        found = masks(masker, batch, step)
        if step is None:
            batches.append({name: found[name].clone() for name in ("input_ids", "attention_mask", "labels")})
        return found

    monkeypatch.setattr(Masker, "__call__", noted)
    run, rows = tune(MASKED_CASE)
    prepare.main(run)
    metrics = train.main(run).metrics or {}
    result = Path(run.workspace) / "result"
    model, tokenizer = loaded("AutoModelForMaskedLM", run, result), AutoTokenizer.from_pretrained(result)
    last, total, right, labels, texts_of_rows = batches[len(batches) // 2 :], 0.0, 0, 0, []
    for batch in last:
        for ids, mask, wanted in zip(*batch.values(), strict=True):
            ids, wanted = ids[mask.bool()], wanted[mask.bool()]
            learnt = wanted != -100
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0][learnt]
            total += torch.nn.functional.cross_entropy(logits, wanted[learnt], reduction="sum").item()
            right, labels = right + (logits.argmax(dim=1) == wanted[learnt]).sum().item(), labels + learnt.sum().item()
            texts_of_rows.append(torch.where(learnt, wanted, ids).tolist())
    assert sorted(texts_of_rows) == sorted(tokenizer(row["text"])["input_ids"] for row in rows)
    assert metrics["evalLoss"] == pytest.approx(total / labels, abs=2e-4)
    assert metrics["accuracy"] == pytest.approx(right / labels)


def test_a_row_counts_by_its_class(tune: Tune, texts: list[str], tmp_path: Path) -> None:
    """The loss of the first step, of all rows: as pandas counts them, and torch weights them."""
    rows = pandas.DataFrame([of_class(text) for text in texts[HELD_OUT:42]])
    torch.manual_seed(5)
    base = save_bert(tmp_path / "base", texts)
    names = {"id2label": {0: "code", 1: "prose"}, "label2id": {"code": 0, "prose": 1}}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, **names)
    model.save_pretrained(base)
    case = Case("balanced", "finetune-classifier.yaml", of_class, logits_of)
    run, _ = tune(replace(case, changes={"model": {"path": str(base)}}), maxSteps=1, batchSize=len(rows))
    prepare.main(run)
    train.main(run)
    counts = rows.label.value_counts()
    weights = {name: len(rows) / (len(counts) * count) for name, count in counts.items()}
    assert len(set(weights.values())) == 2
    tokenizer, total = AutoTokenizer.from_pretrained(base), 0.0
    for text, label in rows.itertuples(index=False):
        with torch.no_grad():
            logits = model.eval()(**tokenizer(text, return_tensors="pt")).logits[0]
        total -= weights[label] * logits.log_softmax(dim=0)[names["label2id"][label]].item()
    assert losses(run)[0] == pytest.approx(total / len(rows), abs=2e-4)


@pytest.mark.parametrize("pieces", ["first", "all"])
def test_pieces_of_words_get_the_tags_that_are_asked_for(pieces: str, tune: Tune, bert: Path) -> None:
    """As one reads the tokenizer's words: further pieces of a beginning continue it."""
    case = next(case for case in CASES if case.name == "token-classification")
    run, rows = tune(replace(case, changes={"tagging": {"labelPieces": pieces}}))
    prepare.main(run)
    names, found = read_prepared(run).dataset.labels or [], load_from_disk(read_prepared(run).dataset_path)
    tokenizer, expect, several = AutoTokenizer.from_pretrained(bert), [], 0
    for row in rows:
        read = tokenizer(row["words"], is_split_into_words=True)
        tags: list[str | None] = [None] * len(read["input_ids"])
        for word, tag in enumerate(row["tags"]):
            span = read.word_to_tokens(word)
            rest = tag.replace("B-", "I-") if pieces == "all" else None
            tags[span.start : span.end] = [tag] + [rest] * (span.end - span.start - 1)
            several += tag == "B-NAME" and span.end - span.start > 1
        expect.append((read["input_ids"], [-100 if tag is None else names.index(tag) for tag in tags]))
    assert several
    assert sorted(zip(found["eval"]["input_ids"], found["eval"]["labels"], strict=True)) == sorted(expect)


def test_whole_words_are_masked(texts: list[str], bert: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bert)
    words = [tokenizer(text).word_ids() for text in texts]
    masker = Masker(Masking(unit="word", probability=0.3), tokenizer.mask_token_id, len(tokenizer), seed=1)
    chosen, masked = 0, 0
    for row, of_words in enumerate(words):
        units = numpy.array([ALONE if word is None else word for word in of_words])
        labels, becomes = masker.of_row(units, f"1:0:{row}")
        again, others = (masker.of_row(units, key) for key in (f"1:0:{row}", f"1:1:{row}"))
        assert (labels == again[0]).all()
        assert (becomes == again[1]).all()
        padded = masker.of_row(numpy.append(units, [ALONE] * 7), f"1:0:{row}")
        assert (padded[0][:-7] == labels).all()
        assert (padded[1][:-7] == becomes).all()
        assert labels.any()
        assert not labels[[0, -1]].any()
        for word in set(units.tolist()) - {ALONE}:
            assert labels[units == word].all() or not labels[units == word].any()
        chosen, masked = chosen + labels.sum(), masked + (becomes == tokenizer.mask_token_id).sum()
        assert len(units) < 6 or (labels != others[0]).any() or (becomes != others[1]).any()
    total = sum(len(of_words) - 2 for of_words in words)
    assert chosen / total == pytest.approx(0.3, abs=0.03)
    assert masked / chosen == pytest.approx(MASKED, abs=0.03)


# ---- what prepare refuses, or tells


@dataclass(frozen=True)
class Refusal:
    name: str
    task: str
    rows: list[Row]
    message: str
    settings: dict[str, Any] = field(default_factory=dict)
    model: str = "bert"


REFUSALS = [
    Refusal(
        name="a word without a tag",
        task="token-classification",
        rows=[{"words": ["a", "b"], "tags": ["O", "B-X"]}, {"words": ["a", "b"], "tags": ["O"]}],
        message="is row 1, counted from 0 (line 2 of rows.jsonl): it has 2 words and 1 tags; each word needs one",
    ),
    Refusal(
        name="tags of BILOU",
        task="token-classification",
        rows=[{"words": ["a", "b"], "tags": ["B-X", "L-X"]}, {"words": ["c"], "tags": ["O"]}],
        message="beside them L-X, which are no BIO tags.",
    ),
    Refusal(
        name="words that are no list",
        task="token-classification",
        rows=[{"words": "a b", "tags": ["O", "O"]}],
        message="write a list of texts, in CSV as JSON",
    ),
    Refusal(
        name="an answer at the wrong place",
        task="question-answering",
        rows=[{"question": "what?", "context": "a lute", "answers": {"text": ["lute"], "answer_start": [1]}}],
        message='answer_start 1 of "lute" is wrong: there stands " lut"; it stands at 2',
    ),
    Refusal(
        name="an answer that is not in the context",
        task="question-answering",
        rows=[{"question": "what?", "context": "a lute", "answers": {"text": ["harp"], "answer_start": [2]}}],
        message="it does not stand in the context, and this task finds answers only there",
    ),
    Refusal(
        name="a question without room for its context",
        task="question-answering",
        rows=[{"question": "what? " * 30, "context": "a lute", "answers": None}],
        message="Raise maxLength, lower stride, or shorten the question",
    ),
    Refusal(
        name="labels that are no list",
        task="text-classification",
        rows=[{"text": "a", "label": ["x"]}, {"text": "b", "label": "y"}],
        message="multi-label needs a list of names, in CSV as JSON",
        settings={"classification": {"problem": "multi-label"}},
    ),
    Refusal(
        name="a label that is no number",
        task="text-classification",
        rows=[{"text": "a", "label": 1.5}, {"text": "b", "label": "many"}],
        message="regression needs a number in each row. The first of the fewest is row",
        settings={"classification": {"problem": "regression"}},
    ),
    Refusal(
        name="a weight for a class that no row has",
        task="text-classification",
        rows=[{"text": "a", "label": "x"}, {"text": "b", "label": "y"}],
        message="spec.classification.classWeights: no training row has the label z; the labels are: x, y",
        settings={"classification": {"classWeights": {"z": 2.0}}},
    ),
    Refusal(
        name="no source",
        task="seq2seq",
        rows=[{"text": "a", "target": "b"}],
        message='spec.dataset.columns.source: no column "source" in',
        model="t5",
    ),
    Refusal(
        name="an encoder that writes",
        task="seq2seq",
        rows=[{"source": "a", "target": "b"}],
        message="architecture bert cannot do seq2seq; choose another model or task",
    ),
    Refusal(
        name="no mask token",
        task="masked-lm",
        rows=[{"text": "a lute"}],
        message="architecture t5 cannot do masked-lm; choose another model or task",
        model="t5",
    ),
    Refusal(
        name="a decoder beside the encoder",
        task="embedding",
        rows=[{"anchor": "a", "positive": "b"}],
        message="t5 has a decoder, which makes no vectors of texts; choose an encoder such as BERT",
        model="t5",
    ),
    Refusal(
        name="a metric of entities for parts of speech",
        task="token-classification",
        rows=[{"words": ["a", "lute"], "tags": ["DET", "NOUN"]}],
        message="spec.training.metric: f1 is of entities, and no tag of the rows begins with B- or I-.",
        settings={"training": {"maxLength": 48, "batchSize": 8, "metric": "f1", "earlyStopping": {"patience": 1}}},
    ),
]


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_rows_and_models_that_do_not_suit_are_refused(
    case: Refusal, make_run: Any, tmp_path: Path, bert: Path, t5: Path
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    model = {"bert": bert, "t5": t5}[case.model]
    spec = {"task": case.task, "model": {"path": str(model)}, "dataset": {"files": [str(file)]}}
    course = {"training": {"maxLength": 48, "batchSize": 8}}
    with pytest.raises(Failure) as failure:
        prepare.main(make_run(**spec, **course | case.settings))
    assert case.message in str(failure.value)


def test_what_is_measured_of_rare_types_and_broken_tags_is_told(make_run: Any, tmp_path: Path, bert: Path) -> None:
    rows = [{"words": ["a", "b"], "tags": ["I-X", "O"]}, {"words": ["a"] * 60, "tags": ["B-Y"] * 60}]
    for name, some in (("train", rows), ("held", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    dataset = {"files": [str(tmp_path / "train.jsonl")], "evalFiles": [str(tmp_path / "held.jsonl")]}
    prepare.main(
        make_run(
            task="token-classification",
            model={"path": str(bert)},
            dataset=dataset,
            training={"maxLength": 48, "batchSize": 8},
        )
    )
    told = "\n".join(notices.given())
    assert "have an I- tag that continues no entity of its type" in told
    assert 'word 0, "a", has I-X' in told
    assert "14 words of training rows have no token within 48 tokens, and are neither learnt nor measured" in told
    assert "1 of 2 types are in no held-out row (Y). f1Macro counts each as 0" in told


def test_no_layer_is_left_out_at_random(tune: Tune, t5: Path, tmp_path: Path) -> None:
    """As the configurations of M2M100 and NLLB ask for. What is planned then follows from the job alone."""
    tokenizer = AutoTokenizer.from_pretrained(t5)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SMALL_BART.items()}
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layerdrop=0.5,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    case = next(case for case in CASES if case.check is seq2seq)
    changes = {"model": {"path": str(tmp_path / "bart")}, "resources": {"gpusPerNode": 0, "memory": "64Gi"}}
    run, _ = tune(replace(case, changes=changes), maxSteps=1)
    torch.manual_seed(0)
    prepare.main(run)
    assert read_prepared(run).memory_facts.missing is None
    assert [text for text in notices.given() if "lets whole layers out at random" in text]
    train.main(run)
    assert json.loads((Path(run.workspace) / "result/config.json").read_text())["encoder_layerdrop"] == 0
