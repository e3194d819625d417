"""summarization, translation and text2text-generation: texts that an encoder and a decoder make of other texts.

A text depends only on what it is made of, its seed and the batch size, as with the other engines: see `reading`, which
pads what the encoder reads, and `sampling`, which draws the tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec, TextSettings
from luthier_trainer.generation.engines.reading import Piece, Read, ReadingEngine, keys_of
from luthier_trainer.generation.records import ValueRecords
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.generation.sampling import PENALTIES, Choice, Chosen, Ended, Heartbeat, chain_of
from luthier_trainer.generation.texts import Text
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

VALUES = ("output",)
FACTS = ("tokens", "truncated", "newTokens", "finishReason")
TOKENS_OF_MODEL = (
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "suppress_tokens",
    "begin_suppress_tokens",
)
"""What is taken of the model's own settings of generation: which tokens begin and end a text, not how they are chosen.
"""


class Seq2SeqEngine(ReadingEngine):
    """Reads texts, and writes others."""

    records: ClassVar[ValueRecords] = ValueRecords(keys=keys_of("text2text-generation", VALUES, FACTS), values=VALUES)

    @classmethod
    def check(
        cls, spec: GenerateJobSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, field: str
    ) -> None:
        """Check that the tokenizer knows the languages of the job. Raises Failure if not."""
        target, source = spec.text.target_language, spec.text.source_language
        knows = hasattr(tokenizer, "src_lang")
        kind = type(tokenizer).__name__
        if not knows and (target or source):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.text.targetLanguage: the tokenizer of the model ({kind}) knows no languages; remove it, and"
                " sourceLanguage, and write what the model expects before each text (text.prefix)",
            )
        if knows and spec.task == "translation" and not (target and source):
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.text.targetLanguage: the model translates between many languages ({kind}); set it, and"
                " text.sourceLanguage, by the codes of its tokenizer, such as eng_Latn or en_XX",
            )
        for name, code in (("sourceLanguage", source), ("targetLanguage", target)):
            if code and language_token(tokenizer, code) is None:
                raise Failure(
                    ExitCode.INVALID_SPEC,
                    f"spec.text.{name}: the tokenizer of the model ({kind}) has no language {code}; the card of the"
                    " model lists the codes",
                )

    def __init__(self, spec: GenerateJobSpec, model: PreTrainedModel, processor: Path, batch_size: int) -> None:
        self.start = model.generation_config.decoder_start_token_id
        if self.start is None:
            self.start = model.config.decoder_start_token_id
        super().__init__(spec, model, processor, batch_size)
        settings, own = spec.text, copy.deepcopy(model.generation_config)
        kept = {name: value for name in TOKENS_OF_MODEL if (value := getattr(own, name, None)) is not None}
        if settings.source_language and settings.target_language:
            self.tokenizer.src_lang = settings.source_language
            kept["forced_bos_token_id"] = language_token(self.tokenizer, settings.target_language)
        if (own.num_beams or 1) > 1 and settings.num_beams == 1:
            notice(
                f"spec.text.numBeams: the model's own settings ask for {own.num_beams} beams, and this job takes the"
                f" likeliest token, or draws one, at each step; set numBeams: {own.num_beams} to search as they do"
            )
        model.generation_config = GenerationConfig(
            **{"decoder_start_token_id": self.start, **kept},
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
            pad_token_id=self.padding,
        )
        ends = model.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends]) - {None}
        self.choice = Choice()

    def read(self, sample: Sample) -> Read:
        return self.whole_text((self.spec.text.prefix or "") + sample.cells["text"])

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece], length: int) -> Sequence[torch.Tensor]:
        """Return the logits of the first token of each text."""
        first = torch.full((len(pieces), 1), self.start, device=self.model.device)
        outputs = self.model(**self.batch(pieces, length), decoder_input_ids=first)
        return list(outputs.logits[:, 0].float().cpu())

    def work(self, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, a batch at a time. Beams are searched for one text alone."""
        for sample in samples:
            if self.settings_of(sample).num_beams > 1:
                yield [self.search(sample)]
        yield from super().work([sample for sample in samples if self.settings_of(sample).num_beams == 1])

    def settings_of(self, sample: Sample) -> TextSettings:
        """Return the settings of a sample, with what its row overrides."""
        assert isinstance(sample.settings, TextSettings), "those of its task"
        return sample.settings

    def text(self, sample: Sample) -> Text:
        """Return the text that is made of a sample, before its first token."""
        settings = self.settings_of(sample)
        text = Text([self.start], settings, sample.seed or 0, self.ends, self.tokenizer, work=sample)
        text.penalties = chain_of(PENALTIES, settings, text)
        return text

    @torch.inference_mode()
    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """Return the outputs of samples of one group, in the same order."""
        length = self.group(samples[0])
        assert isinstance(length, int)
        batch = padded(samples, self.batch_size)
        texts = [self.text(sample) for sample in batch]
        self.model.generate(
            **self.batch([self.read_once(sample).pieces[0] for sample in batch], length),
            logits_processor=[Chosen(texts, self.choice, self.padding)],
            stopping_criteria=[Ended(texts)],
            max_new_tokens=max(text.settings.max_new_tokens for text in texts),
        )
        return [self.output(text) for text in texts[: len(samples)]]

    @torch.inference_mode()
    def search(self, sample: Sample) -> Output:
        """Return the output of a sample with beam search: transformers' own, over this text alone."""
        text, settings, piece = self.text(sample), self.settings_of(sample), self.read_once(sample).pieces[0]
        made = self.model.generate(
            **self.batch([piece], piece.length),
            logits_processor=[Heartbeat()],
            num_beams=settings.num_beams,
            max_new_tokens=settings.max_new_tokens,
            length_penalty=settings.length_penalty,
            min_new_tokens=settings.min_new_tokens or None,
            repetition_penalty=settings.repetition_penalty,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
        )
        for token in made[0, 1:].tolist():
            if not text.ended:
                text.take(token)
        return self.output(text)

    def output(self, text: Text) -> Output:
        """Return the output of a text that has ended."""
        read = self.found.pop(text.work.key)
        facts = {**read.facts, "newTokens": len(text.new), "finishReason": text.finish}
        return Output(text.work, facts, values={"output": text.text()})


def language_token(tokenizer: PreTrainedTokenizerBase, code: str) -> int | None:
    """Return the id of the token of a language; None if the tokenizer has none."""
    token = getattr(tokenizer, "lang_code_to_token", {}).get(code, code)
    number = tokenizer.convert_tokens_to_ids(token)
    return None if number is None or number == tokenizer.unk_token_id else int(number)
