"""question-answering: the span of a context that answers a question, by the rules of SQuAD.

A context that is longer than a window is read in windows that overlap (`answers.stride`). The answer is the best span
of all windows: that with the highest sum of the logits of its first and its last token, among spans that lie in the
context and have at most `answers.maxTokens` tokens. The best score for no answer is the least of those of the windows,
as in the evaluation of SQuAD 2.0: a window without the answer must not outvote the one that has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from luthier_trainer.generation.engines.answering import AnsweringEngine
from luthier_trainer.generation.engines.reading import Piece, Read
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Sample

VALUES = ("answer", "start", "end", "score", "answers")


@dataclass(frozen=True)
class Span:
    """An answer: characters `start` to `end` of the context, or none. `logit`: the sum of its two logits."""

    logit: float
    start: int | None
    end: int | None


class SpanEngine(AnsweringEngine):
    """Reads questions with their contexts, and writes the answers."""

    records: ClassVar[ValueRecords] = ValueRecords(
        keys=keys_of("question-answering", VALUES, ("tokens", "windows")), values=VALUES
    )
    needs_positions: ClassVar[bool] = True

    @property
    def window(self) -> int:
        """Tokens of a window: those of the job, or as many as the model reads."""
        window = self.spec.answers.window
        return window if self.limit is None else min(window, self.limit)

    def read(self, sample: Sample) -> Read:
        question, context = sample.cells["question"].lstrip(), sample.cells["context"]
        stride = self.spec.answers.stride
        alone = len(self.tokenizer(question, "", verbose=False)["input_ids"])
        if alone + stride >= self.window:
            return Read(
                [],
                problem=f"question: {alone} tokens and answers.stride {stride} leave no room for the context in a"
                f" window of {self.window} tokens; shorten the question, lower answers.stride or raise answers.window",
            )
        encoding = self.tokenizer(
            question,
            context,
            truncation="only_second",
            max_length=self.window,
            stride=stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        pieces = []
        for i in range(len(encoding["input_ids"])):
            window = {name: values[i] for name, values in encoding.items()}
            of_context = [
                offsets if part == 1 and offsets[1] > offsets[0] else None
                for offsets, part in zip(window["offset_mapping"], encoding.sequence_ids(i), strict=True)
            ]
            pieces.append(Piece(self.model_inputs(window), {"offsets": of_context}))
        tokens = len(self.tokenizer(question, context, verbose=False)["input_ids"])
        return Read(pieces, {"tokens": tokens, "windows": len(pieces)})

    def answers(self, outputs: Any, pieces: Sequence[Piece]) -> Sequence[torch.Tensor]:
        logits = torch.stack([outputs.start_logits, outputs.end_logits], dim=1).float().cpu()  # [pieces, 2, length]
        return [one[:, : piece.length] for one, piece in zip(logits, pieces, strict=True)]

    def values(self, sample: Sample, pieces: Sequence[Piece], answers: Sequence[torch.Tensor]) -> dict[str, Any]:
        settings, context = self.spec.answers, sample.cells["context"]
        windows = list(zip(pieces, answers, strict=True))
        best: dict[tuple[int, int], Span] = {}
        total = []
        for piece, logits in windows:
            spans, weight = spans_of(logits, piece.about["offsets"], settings.max_tokens, settings.top_k)
            total.append(weight)
            for span in spans:
                place = (span.start or 0, span.end or 0)
                if place not in best or span.logit > best[place].logit:
                    best[place] = span
        ranked = sorted(best.values(), key=lambda span: -span.logit)
        if settings.allow_none:
            none = Span(min(self.no_answer(piece, logits) for piece, logits in windows), None, None)
            total.append(torch.tensor(none.logit, dtype=torch.float64))
            is_none = not ranked or none.logit - ranked[0].logit > settings.none_threshold
            ranked = [none, *ranked] if is_none else ranked
        if not ranked:
            return {"answer": "", "start": None, "end": None, "score": 0.0, "answers": []}
        weight = torch.stack(total).logsumexp(0)
        found = [
            {
                "answer": "" if span.start is None else context[span.start : span.end],
                "start": span.start,
                "end": span.end,
                "score": float((torch.tensor(span.logit, dtype=torch.float64) - weight).exp()),
            }
            for span in ranked[: settings.top_k]
        ]
        return {**found[0], "answers": found}

    def no_answer(self, piece: Piece, logits: torch.Tensor) -> float:
        """Return the score that a window gives to no answer: that of its token [CLS], or else of its first one."""
        ids = list(piece.inputs["input_ids"])
        token = self.tokenizer.cls_token_id
        at = ids.index(token) if token in ids else 0
        return float(logits[0, at].double() + logits[1, at].double())


def spans_of(
    logits: torch.Tensor, offsets: Sequence[Sequence[int] | None], longest: int, count: int
) -> tuple[list[Span], torch.Tensor]:
    """Return the `count` best spans of a window, and the logarithm of the sum of the exponentials of all spans.

    `logits`: [2, tokens], of first and last tokens. `offsets`: first character and the one after the last, of tokens
    that belong to the context; None for the others.
    """
    inside = torch.tensor([one is not None for one in offsets])
    scores = logits[0].double()[:, None] + logits[1].double()[None, :]
    allowed = inside[:, None] & inside[None, :]
    allowed &= torch.ones_like(allowed).triu().tril(longest - 1)
    scores = scores.masked_fill(~allowed, -torch.inf)
    values, places = scores.flatten().topk(min(count, scores.numel()))
    return list(_spans(values, places, offsets)), scores.flatten().logsumexp(0)


def _spans(values: torch.Tensor, places: torch.Tensor, offsets: Sequence[Sequence[int] | None]) -> Iterator[Span]:
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        first, last = offsets[place // len(offsets)], offsets[place % len(offsets)]
        if first is not None and last is not None and value > -torch.inf:
            yield Span(value, int(first[0]), int(last[1]))
