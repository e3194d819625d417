"""The tasks that read texts, from the manifest to the lines: each against transformers alone, one row at a time."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from cases.quick import quick
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.metrics import accuracy_score, f1_score
from trainer.generating import generate_run, generate_shards, result_lines
from trainer.word_pieces import word_pieces
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, GenerateRun
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation import main as generate
from luthier_trainer.generation.engines.answering import AnsweringEngine
from luthier_trainer.generation.engines.reading import Piece
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training.main import main as train

Line = dict[str, Any]
POSITIONS = 64
NLI = {0: "contradiction", 1: "neutral", 2: "entailment"}
TAGS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "B-LOC", 4: "I-LOC"}


@pytest.fixture(scope="module")
def tokenizer(paragraphs: list[str]) -> PreTrainedTokenizerFast:
    return word_pieces(paragraphs[:100], POSITIONS)


Save = Callable[..., Path]


@pytest.fixture(scope="module")
def save(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Save:
    """Saves a small model of a class, with random weights large enough that answers differ."""

    def write(kind: type[PreTrainedModel], **config: Any) -> Path:
        folder = tmp_path_factory.mktemp("model")
        tokenizer.save_pretrained(folder)
        small = T5Config(
            vocab_size=400,
            d_model=16,
            d_ff=32,
            d_kv=8,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
        if kind is not T5ForConditionalGeneration:
            small = BertConfig(
                vocab_size=400,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=POSITIONS,
                initializer_range=0.5,
                **config,
            )
        torch.manual_seed(3)
        kind(small).save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="module")
def texts(paragraphs: list[str]) -> list[str]:
    """Of 1 to about 30 words."""
    return [" ".join(paragraph.split()[: 1 + 4 * (i % 8)])[:150] for i, paragraph in enumerate(paragraphs[20:34])]


Lines = Callable[..., list[Line]]


@pytest.fixture
def lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """The lines of a job, in the order of its rows; keywords are fields of its spec."""

    def make(rows: list[Line], **spec: Any) -> list[Line]:
        workspace = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        run = generate_run(workspace, rows, **{"batchSize": 4} | spec)
        generate_shards(run, monkeypatch, prepare)
        return result_lines(run)

    return make


def close(found: Any, expect: Any) -> bool:
    """Whether two values of JSON are the same, but for rounding."""
    if isinstance(expect, dict):
        return found.keys() == expect.keys() and all(close(found[name], expect[name]) for name in expect)
    if isinstance(expect, list):
        return len(found) == len(expect) and all(close(a, b) for a, b in zip(found, expect, strict=True))
    if isinstance(expect, float):
        return abs(found - expect) <= 1e-4 * max(1.0, abs(expect))
    return bool(found == expect)


def scores(folder: Path, row: Line) -> Line:
    return {"scores": pipeline("text-classification", str(folder), device="cpu", top_k=None)([row["text"]])[0]}


def entities(strategy: str) -> Callable[[Path, Line], Line]:
    def found(folder: Path, row: Line) -> Line:
        made = pipeline("token-classification", str(folder), device="cpu", aggregation_strategy=strategy)(row["text"])
        return {
            "entities": [
                {
                    "label": one.get("entity_group") or one["entity"],
                    "score": float(one["score"]),
                    "word": one["word"],
                    "start": one["start"],
                    "end": one["end"],
                }
                for one in made
            ]
        }

    return found


def parts(folder: Path, row: Line) -> Line:
    made = pipeline("token-classification", str(folder), device="cpu", aggregation_strategy="simple", stride=8)
    return {"entities": [{"start": one["start"], "end": one["end"]} for one in made(row["text"])]}


def topics(multi: bool) -> Callable[[Path, Line], Line]:
    def found(folder: Path, row: Line) -> Line:
        made = pipeline("zero-shot-classification", str(folder), device="cpu")(
            row["text"], ["class", "module"], multi_label=multi
        )
        ranked = [{"label": name, "score": score} for name, score in zip(made["labels"], made["scores"], strict=True)]
        return {"scores": ranked}

    return found


def fills(folder: Path, row: Line) -> Line:
    made = pipeline("fill-mask", str(folder), device="cpu", top_k=3)(row["text"])
    several = made if isinstance(made[0], list) else [made]
    return {
        "tokens": [
            {"mask": mask, "id": one["token"], "score": one["score"]}
            for mask, some in enumerate(several)
            for one in some
        ]
    }


def vector(pooling: str, unit: bool) -> Callable[[Path, Line], Line]:
    def found(folder: Path, row: Line) -> Line:
        model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        with torch.inference_mode():
            states = model(**tokenizer(row["text"], return_tensors="pt")).last_hidden_state[0].numpy()
        made = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
        return {"embedding": (made / numpy.linalg.norm(made) if unit else made).tolist()}

    return found


def written(prefix: str, **settings: Any) -> Callable[[Path, Line], Line]:
    def found(folder: Path, row: Line) -> Line:
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        made = model.generate(
            **tokenizer(prefix + row["text"], return_tensors="pt", return_token_type_ids=False),
            max_new_tokens=8,
            do_sample=False,
            **settings,
        )
        return {"output": tokenizer.decode(made[0, 1:], skip_special_tokens=True)}

    return found


@dataclass(frozen=True)
class Case:
    name: str
    spec: Line
    kind: type[PreTrainedModel]
    expect: Callable[[Path, Line], Line]
    config: Line = field(default_factory=dict)
    text: Callable[[str], str] = str


CASES = [
    Case(
        name="one label of three",
        spec={"task": "text-classification"},
        kind=BertForSequenceClassification,
        config={"num_labels": 3},
        expect=scores,
    ),
    Case(
        name="any of three labels",
        spec={"task": "text-classification"},
        kind=BertForSequenceClassification,
        config={"num_labels": 3, "problem_type": "multi_label_classification"},
        expect=scores,
    ),
    Case(
        name="a number",
        spec={"task": "text-classification"},
        kind=BertForSequenceClassification,
        config={"num_labels": 1, "problem_type": "regression"},
        expect=scores,
    ),
    *(
        Case(
            name=f"entities, {strategy}",
            spec={"task": "token-classification", "entities": {"aggregation": strategy}},
            kind=BertForTokenClassification,
            config={"id2label": TAGS},
            expect=entities(strategy),
        )
        for strategy in ("none", "simple", "first", "average", "max")
    ),
    *(
        Case(
            name=f"labels of the job, {'any' if multi else 'one'} of them",
            spec={
                "task": "zero-shot-classification",
                "zeroShot": {"labels": ["class", "module"], "multiLabel": multi},
            },
            kind=BertForSequenceClassification,
            config={"id2label": NLI, "label2id": {name: number for number, name in NLI.items()}},
            text=lambda text: text[:50],  # so that the sentence with the label fits as well
            expect=topics(multi),
        )
        for multi in (False, True)
    ),
    Case(
        name="two masks",
        spec={"task": "fill-mask", "mask": {"topK": 3}},
        kind=BertForMaskedLM,
        text="The [MASK] is {} a [MASK]".format,
        expect=fills,
    ),
    *(
        Case(
            name=f"vectors, {pooling}{', of length 1' * unit}",
            spec={"task": "feature-extraction", "embedding": {"pooling": pooling, "normalize": unit}},
            kind=BertModel,
            expect=vector(pooling, unit),
        )
        for pooling, unit in (("mean", True), ("cls", False), ("last", False))
    ),
    Case(
        name="other texts, with a prefix",
        spec={"task": "summarization", "text": {"maxNewTokens": 8, "prefix": "sum up : "}},
        kind=T5ForConditionalGeneration,
        expect=written("sum up : "),
    ),
    Case(
        name="other texts, by beam search",
        spec={"task": "translation", "text": {"maxNewTokens": 8, "numBeams": 3}},
        kind=T5ForConditionalGeneration,
        expect=written("", num_beams=3),
    ),
    Case(
        name="other texts, drawn: the seed of each row decides",
        spec={"task": "text2text-generation", "text": {"maxNewTokens": 8, "temperature": 2}},
        kind=T5ForConditionalGeneration,
        expect=lambda folder, row: {},
    ),
]


@pytest.mark.parametrize(
    "case",
    quick(
        CASES,
        "one label of three",
        "entities, average",
        "labels of the job, any of them",
        "two masks",
        "vectors, last",
        "other texts, by beam search",
    ),
)
def test_a_task_gives_what_transformers_gives(case: Case, save: Save, texts: list[str], lines: Lines) -> None:
    """And the same bits whatever the order of the rows, their neighbours and the number of shards are."""
    folder = save(case.kind, **case.config)
    rows = [{"text": case.text(text)} for text in texts]
    if "temperature" in case.spec.get("text", {}):
        rows = [row | {"seed": i} for i, row in enumerate(rows)]
    found = lines(rows, model={"path": str(folder)}, **case.spec)
    for row, line in zip(rows, found, strict=True):
        expect = case.expect(folder, row)
        assert close({name: project(line[name], value) for name, value in expect.items()}, expect), row

    order = random.Random(5).sample(range(len(rows)), len(rows) - 3)
    among_others = lines([rows[i] for i in order], model={"path": str(folder)}, shards=3, **case.spec)
    assert [line["sha256"] for line in among_others] == [found[i]["sha256"] for i in order]


def project(found: Any, like: Any) -> Any:
    """`found` with those keys of objects in lists that `like` has."""
    if isinstance(like, list) and like and isinstance(like[0], dict):
        return [{name: item[name] for name in like[0]} for item in found]
    return found


def test_references_that_are_labels(
    save: Save, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metrics of the last shard are those of all lines; labels that the model does not have are refused."""
    folder = save(BertForSequenceClassification, num_labels=3)
    table = tmp_path / "rows.csv"
    wanted = [f"LABEL_{i % 3}" for i in range(len(texts))]

    def ran(shards: int, references: list[str]) -> tuple[GenerateRun, list[TerminationMessage]]:
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "wanted"), *zip(texts, references, strict=True)])
        run = generate_run(
            tmp_path / f"{shards} shards",
            [],
            task="text-classification",
            model={"path": str(folder)},
            inputs={"dataset": {"files": [str(table)]}, "columns": {"reference": "wanted"}},
            shards=shards,
        )
        return run, generate_shards(run, monkeypatch, prepare)

    run, messages = ran(3, wanted)
    answered = [line["label"] for line in result_lines(run)]
    assert [line["reference"] for line in result_lines(run)] == wanted
    expect = {
        "accuracy": accuracy_score(wanted, answered),
        "f1Macro": f1_score(wanted, answered, average="macro"),
        "majorityShare": max(Counter(wanted).values()) / len(wanted),
    }
    found = [{name: value for name, value in (m.metrics or {}).items() if name in expect} for m in messages]
    assert found == [{}, {}, pytest.approx(expect)]
    (whole,) = ran(1, wanted)[1]
    assert whole.metrics
    assert {name: whole.metrics[name] for name in expect} == found[-1]
    with pytest.raises(Failure, match="no reference is a label of the model: glad, sad"):
        ran(2, ["glad", "sad"] * (len(texts) // 2))


# Questions


def best_span(
    folder: Path, question: str, context: str, window: int, stride: int, longest: int
) -> tuple[str, float, float]:
    """The best answer, its score and that of none, by loops over windows and spans as in SQuAD's own evaluation."""
    model, tokenizer = AutoModelForQuestionAnswering.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=window,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    best, answer, none = -numpy.inf, "", numpy.inf
    for i, ids in enumerate(found["input_ids"]):
        with torch.inference_mode():
            out = model(
                input_ids=torch.tensor([ids]),
                token_type_ids=torch.tensor([found["token_type_ids"][i]]),
                attention_mask=torch.tensor([found["attention_mask"][i]]),
            )
        starts, ends, inside = out.start_logits[0].tolist(), out.end_logits[0].tolist(), found.sequence_ids(i)
        none = min(none, starts[0] + ends[0])
        for a in range(len(ids)):
            for b in range(a, min(a + longest, len(ids))):
                if inside[a] == 1 and inside[b] == 1 and starts[a] + ends[b] > best:
                    best = starts[a] + ends[b]
                    offsets = found["offset_mapping"][i]
                    answer = context[offsets[a][0] : offsets[b][1]]
    return answer, best, none


def test_answers_are_the_best_spans_of_all_windows(save: Save, paragraphs: list[str], lines: Lines) -> None:
    folder = save(BertForQuestionAnswering)
    rows = [
        {"question": f"What is {paragraphs[i].split()[0]}?", "context": " ".join(paragraphs[i : i + 2])[:400]}
        for i in range(20, 28)
    ]
    settings = {"window": 48, "stride": 16, "maxTokens": 6}
    spec = {"task": "question-answering", "model": {"path": str(folder)}}
    found = lines(rows, answers=settings | {"topK": 3}, **spec)
    expected = [best_span(folder, row["question"], row["context"], 48, 16, 6) for row in rows]
    margins = sorted(none - best for _, best, none in expected)
    threshold = (margins[3] + margins[4]) / 2
    some_none = lines(rows, answers=settings | {"allowNone": True, "noneThreshold": threshold}, shards=3, **spec)
    assert max(line["windows"] for line in found) > 2
    empty = 0
    for row, line, other, (answer, best, none) in zip(rows, found, some_none, expected, strict=True):
        assert line["answer"] == answer == row["context"][line["start"] : line["end"]]
        assert [one["score"] for one in line["answers"]] == sorted(
            (one["score"] for one in line["answers"]), reverse=True
        )
        assert other["answer"] == ("" if none - best > threshold else answer)
        empty += other["answer"] == ""
    assert 0 < empty < len(rows)


def test_a_question_that_fills_the_window_is_an_error(save: Save, lines: Lines) -> None:
    rows = [{"question": "What is " * 30, "context": "a class"}, {"question": "What?", "context": "a class"}]
    found = lines(
        rows, task="question-answering", model={"path": str(save(BertForQuestionAnswering))}, answers={"stride": 8}
    )
    assert [line["error"] is None for line in found] == [False, True]
    assert "leave no room for the context in a window of 64 tokens" in found[0]["error"]


# Long texts


def test_a_long_text_is_refused_or_cut_or_read_in_parts(save: Save, texts: list[str], lines: Lines) -> None:
    long = " ".join(texts[1:9])
    spec = {"task": "token-classification", "model": {"path": str(save(BertForTokenClassification, id2label=TAGS))}}
    refused, short = lines([{"text": long}, {"text": texts[1]}], **spec)
    tokens = refused["error"].split()[1]
    assert refused["error"].startswith(f"text: {tokens} tokens are more than the model's {POSITIONS};")
    assert short["error"] is None

    (cut,) = lines([{"text": long}], **spec, inputs={"rows": [{"text": long}], "truncate": True})
    assert (cut["tokens"], cut["truncated"], cut["error"]) == (int(tokens), True, None)

    (whole,) = lines([{"text": long}], **spec, entities={"stride": 8})
    expect = parts(Path(spec["model"]["path"]), {"text": long})
    assert project(whole["entities"], expect["entities"]) == expect["entities"]
    assert max(one["end"] for one in whole["entities"]) > max(one["end"] for one in cut["entities"])
    assert whole["truncated"] is False


# Adapters


def test_an_adapter_brings_its_head(save: Save, tmp_path: Path, texts: list[str], lines: Lines) -> None:
    base, adapter, labels = save(BertModel), tmp_path / "adapter", ["low", "middle", "high"]
    names = {"num_labels": 3, "id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    model = AutoModelForSequenceClassification.from_pretrained(base, **names)
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.5, generator=torch.Generator().manual_seed(len(name)))
    adapted.save_pretrained(adapter)
    model.config.save_pretrained(adapter)

    found = lines(
        [{"text": text} for text in texts],
        task="text-classification",
        model={"path": str(base)},
        adapters=[{"path": str(adapter)}],
    )
    plain = AutoModelForSequenceClassification.from_pretrained(base, **names)
    plain = PeftModel.from_pretrained(plain, adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    for text, line in zip(texts, found, strict=True):
        with torch.inference_mode():
            probabilities = plain(**tokenizer(text, return_tensors="pt")).logits[0].softmax(-1).tolist()
        expect = sorted(zip(labels, probabilities, strict=True), key=lambda one: -one[1])
        assert [one["label"] for one in line["scores"]] == [name for name, _ in expect]
        assert close([one["score"] for one in line["scores"]], [score for _, score in expect])


def test_the_result_of_a_training_classifies(
    make_run: Callable[..., FineTuneRun],
    corpus_rows: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As an adapter beside its base, and as a whole model: by the name of its job."""
    tuned = make_run("tuned", task="text-classification", training={"maxLength": 32, "batchSize": 8, "maxSteps": 2})
    prepare(tuned)
    train(tuned)
    texts = [json.loads(line)["text"][:80] for line in corpus_rows.read_text().splitlines()[:5]]
    sources = {"tuned": tuned.workspace}
    found = []
    for name, spec in (
        ("beside", {"model": {"path": str(tiny_model)}, "adapters": [{"job": "tuned"}]}),
        ("whole", {"model": {"job": "tuned"}}),
    ):
        run = generate_run(tmp_path / name, [{"text": text} for text in texts], task="text-classification", **spec)
        run = run.model_copy(update={"sources": sources})
        generate_shards(run, monkeypatch, prepare)
        found.append(result_lines(run))
    beside, whole = found
    assert {line["label"] for line in beside} <= {"class", "other"}
    for one, other in zip(beside, whole, strict=True):
        assert close(one["scores"], other["scores"])
    assert (WorkspaceFolder(Path(tuned.workspace)).result / "adapter_config.json").exists()


def test_batches_are_filled_from_many_rows(
    save: Save, texts: list[str], lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of two lengths that alternate, so that a window of one batch would fill none. Equal texts are alike."""
    monkeypatch.setattr(generate, "WINDOW_BATCHES", 1)
    batches: list[int] = []
    forward = AnsweringEngine.forward

    def counted(engine: AnsweringEngine, pieces: Sequence[Piece], length: int) -> Sequence[torch.Tensor]:
        batches.append(length)
        return forward(engine, pieces, length)

    monkeypatch.setattr(AnsweringEngine, "forward", counted)
    rows = [{"text": "a class"}, {"text": "a class of " + "words " * 5}] * 8
    folder = save(BertForSequenceClassification, num_labels=3)
    found = lines(rows, task="text-classification", model={"path": str(folder)})
    assert len(batches) == 2 + 2 * 2  # of which two find out whether the model ignores padding
    assert len({line["sha256"] for line in found}) == 2


# Refusals of `prepare`


@dataclass(frozen=True)
class RefusedCase:
    name: str
    kind: type[PreTrainedModel]
    spec: Line
    message: str
    config: Line = field(default_factory=dict)


REFUSED = [
    RefusedCase(
        name="a model without a head",
        kind=BertModel,
        spec={"task": "text-classification"},
        message="(BertModel) has no head for text-classification: it holds no classifier.bias, classifier.weight",
    ),
    RefusedCase(
        name="a model that is a classifier of texts",
        kind=BertForSequenceClassification,
        spec={"task": "token-classification"},
        message="(BertForSequenceClassification) has no head for token-classification: it holds no classifier.bias,",
    ),
    RefusedCase(
        name="a classifier, for masks",
        kind=BertForSequenceClassification,
        spec={"task": "fill-mask"},
        message="the model is a classifier (BertForSequenceClassification) and has no head for fill-mask",
    ),
    RefusedCase(
        name="labels that entail nothing",
        kind=BertForSequenceClassification,
        config={"num_labels": 3},
        spec={"task": "zero-shot-classification", "zeroShot": {"labels": ["a"]}},
        message="none of its labels (LABEL_0, LABEL_1, LABEL_2) is entailment",
    ),
    RefusedCase(
        name="languages that the tokenizer does not know",
        kind=T5ForConditionalGeneration,
        spec={"task": "translation", "text": {"targetLanguage": "deu_Latn"}},
        message="spec.text.targetLanguage: the tokenizer of the model (TokenizersBackend) knows no languages",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_a_model_that_does_not_suit_is_refused(case: RefusedCase, save: Save, lines: Lines) -> None:
    with pytest.raises(Failure) as failure:
        lines([{"text": "a class"}], model={"path": str(save(case.kind, **case.config))}, **case.spec)
    assert failure.value.code is ExitCode.INVALID_SPEC
    assert case.message in failure.value.message


def test_a_text_without_a_mask_is_an_error(save: Save, lines: Lines) -> None:
    found = lines(
        [{"text": "no mask"}, {"text": "a [MASK]"}], task="fill-mask", model={"path": str(save(BertForMaskedLM))}
    )
    assert found[0]["error"] == "text: [MASK] does not stand in it; write it where the model shall fill in a word"
    assert found[1]["error"] is None
