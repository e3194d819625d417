"""summarization, translation and text2text-generation: texts that an encoder and a decoder make of other texts.

A text depends only on what it is made of, its seed and the batch size, as with the other engines: see `reading`, which
pads what the encoder reads, and `sampling`, which draws the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_trainer.generation.decoding import Decoder, settings_of
from luthier_trainer.generation.engines.reading import Piece, Read, ReadingEngine
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.generation.texts import Text
from luthier_trainer.runtime.failure import Failure

VALUES = ("output",)
FACTS = ("tokens", "truncated", "newTokens", "finishReason")


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
        tokens: dict[str, Any] = {"decoder_start_token_id": self.start}
        if spec.text.source_language and spec.text.target_language:
            self.tokenizer.src_lang = spec.text.source_language
            tokens["forced_bos_token_id"] = language_token(self.tokenizer, spec.text.target_language)
        self.decoder = Decoder(model, self.tokenizer, spec.text, self.start, self.padding, tokens)

    def text_of(self, sample: Sample) -> str:
        return (self.spec.text.prefix or "") + str(sample.cells["text"])

    def read(self, sample: Sample) -> Read:
        return self.whole_text(self.text_of(sample))

    @torch.inference_mode()
    def forward(self, pieces: Sequence[Piece], length: int) -> Sequence[torch.Tensor]:
        """Return the logits of the first token of each text."""
        first = torch.full((len(pieces), 1), self.start, device=self.model.device)
        outputs = self.model(**self.batch(pieces, length), decoder_input_ids=first)
        return list(outputs.logits[:, 0].float().cpu())

    def work(self, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, a batch at a time. Beams are searched for one text alone."""
        for sample in samples:
            if settings_of(sample).num_beams > 1:
                piece = self.read_once(sample).pieces[0]
                yield [self.output(self.decoder.search(sample, self.batch([piece], piece.length)))]
        yield from super().work([sample for sample in samples if settings_of(sample).num_beams == 1])

    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """Return the outputs of samples of one group, in the same order."""
        length = self.group(samples[0])
        assert isinstance(length, int)
        batch = padded(samples, self.batch_size)
        inputs = self.batch([self.read_once(sample).pieces[0] for sample in batch], length)
        texts = self.decoder.write(batch, inputs)
        return [self.output(text) for text in texts[: len(samples)]]

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
