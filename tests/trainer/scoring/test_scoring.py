"""Figures of texts, answers and entities, against what the reference programs print for the same rows.

The figures of seqeval 1.2.2 and rouge-score 0.1.2 were made with these packages once; neither is a dependency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from sacrebleu import corpus_bleu

from luthier_trainer.scoring import texts
from luthier_trainer.scoring.answers import exact_and_f1
from luthier_trainer.scoring.spans import SpanScore, broken, spans, types_of


@dataclass(frozen=True)
class Text:
    name: str
    written: str
    reference: str
    rouge: tuple[float, float, float]  # rouge-score 0.1.2: F of rouge1, rouge2, rougeL


TEXTS = [
    Text(
        name="of its README",
        written="The quick brown dog jumps on the log.",
        reference="The quick brown fox jumps over the lazy dog",
        rouge=(0.7058823529411765, 0.26666666666666666, 0.5882352941176471),
    ),
    Text(
        name="the same words in another order",
        written="on the mat sat the cat",
        reference="the cat sat on the mat",
        rouge=(1.0, 0.6, 0.5),
    ),
    Text(
        name="numbers, hyphens and capitals",
        written="Version 3.11 is state-of-the-art",
        reference="version 3 is the State of art",
        rouge=(0.9333333333333333, 0.30769230769230765, 0.8),
    ),
    Text(
        name="nothing written",
        written="",
        reference="a word",
        rouge=(0.0, 0.0, 0.0),
    ),
]


@pytest.mark.parametrize("case", TEXTS, ids=lambda case: case.name)
def test_rouge_is_that_of_rouge_score(case: Text) -> None:
    assert tuple(texts.numbers(case.written, case.reference)[1:4]) == pytest.approx(case.rouge)


def test_bleu_of_a_corpus_is_that_of_sacrebleu() -> None:
    written, references = [case.written for case in TEXTS], [case.reference for case in TEXTS]
    total = [sum(column) for column in zip(*map(texts.numbers, written, references), strict=True)]
    figures = texts.figures(total, len(TEXTS))
    assert figures["bleu"] == pytest.approx(corpus_bleu(written, [references]).score)
    assert figures["rouge1"] == pytest.approx(sum(case.rouge[0] for case in TEXTS) / len(TEXTS))
    assert figures["exactMatch"] == 0.0


@dataclass(frozen=True)
class Answer:
    name: str
    answer: str
    references: Sequence[str]
    exact: float
    f1: float


ANSWERS = [
    Answer(name="articles, case and punctuation", answer="the Lute!", references=["lute"], exact=1, f1=1),
    Answer(name="the better reference", answer="in old Rome", references=["Athens", "Rome"], exact=0, f1=0.5),
    Answer(name="words count as often as they occur", answer="to to be", references=["to be to"], exact=0, f1=1),
    Answer(name="no answer, rightly", answer="", references=[], exact=1, f1=1),
    Answer(name="no answer, wrongly", answer="", references=["lute"], exact=0, f1=0),
    Answer(name="an answer where there is none", answer="lute", references=[], exact=0, f1=0),
    Answer(name="a reference of an article alone", answer="", references=["the"], exact=1, f1=1),
]


@pytest.mark.parametrize("case", ANSWERS, ids=lambda case: case.name)
def test_answers_are_compared_as_in_squad(case: Answer) -> None:
    assert exact_and_f1(case.answer, case.references) == pytest.approx((case.exact, case.f1))


@dataclass(frozen=True)
class Tags:
    name: str
    wanted: Sequence[str]
    answered: Sequence[str]
    figures: tuple[float, float, float]  # seqeval 1.2.2: precision, recall, f1


TAGS = [
    Tags(
        name="of its README",
        wanted=["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O", "B-PER", "I-PER", "O"],
        answered=["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O", "B-PER", "I-PER", "O"],
        figures=(0.5, 0.5, 0.5),
    ),
    Tags(
        name="I- tags that continue nothing",
        wanted=["I-PER", "O", "B-LOC", "I-PER"],
        answered=["B-PER", "O", "I-LOC", "I-PER"],
        figures=(1.0, 1.0, 1.0),
    ),
    Tags(
        name="a B- tag divides",
        wanted=["B-LOC", "I-LOC", "B-LOC"],
        answered=["B-LOC", "B-LOC", "I-LOC"],
        figures=(0.0, 0.0, 0.0),
    ),
    Tags(
        name="one of three is found",
        wanted=["B-LOC", "O", "B-PER", "O", "B-ORG", "I-ORG"],
        answered=["B-LOC", "O", "O", "O", "B-ORG", "O"],
        figures=(0.5, 1 / 3, 0.4),
    ),
]


@pytest.mark.parametrize("case", TAGS, ids=lambda case: case.name)
def test_entities_are_those_of_seqeval(case: Tags) -> None:
    score = SpanScore(types_of([*case.wanted, *case.answered]))
    figures = score.figures(score.numbers(case.answered, case.wanted))
    assert tuple(figures[name] for name in ("precision", "recall", "f1")) == pytest.approx(case.figures)


def test_a_type_that_is_not_held_out_counts_as_0() -> None:
    score = SpanScore(["LOC", "PER"])
    figures = score.figures(score.numbers(["B-LOC"], ["B-LOC"]))
    assert (figures["f1"], figures["f1Macro"]) == (1.0, 0.5)


def test_an_i_tag_that_continues_nothing_is_found() -> None:
    assert broken(["O", "B-LOC", "I-LOC", "I-PER"]) == 3
    assert broken(["B-LOC", "I-LOC", "B-PER", "I-PER"]) is None
    assert list(spans(["I-LOC", "I-PER"])) == [("LOC", 0, 0), ("PER", 1, 1)]
