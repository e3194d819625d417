"""image-to-text: a text for each image, such as a caption, by models that need no prompt.

A text depends only on its image, its seed and the batch size, as with the other engines: see `looking`, and `sampling`,
which draws the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.decoding import Decoder, settings_of
from luthier_trainer.generation.engines.looking import LookingEngine
from luthier_trainer.generation.records import ValueRecords, keys_of
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.generation.texts import Text
from luthier_trainer.models.processors import read_tokenizer
from luthier_trainer.runtime.failure import Failure

VALUES = ("output",)
FACTS = ("newTokens", "finishReason")
TOKENIZER = "tokenizer"
"""Folder of the tokenizer in what `prepare` leaves."""


@dataclass(frozen=True)
class Captioner:
    """How an architecture writes a text of an image alone."""

    start: Callable[[Any], int]
    """Model → the token that its texts begin with."""
    tokens: Callable[[Any], Mapping[str, Any]] = lambda model: {}
    """Model → settings of generation that its `generate` sets itself."""
    decoder: Callable[[Any], PreTrainedModel | None] = lambda model: None
    """Model → the part of it that has the settings of generation; None: the model itself."""


def first_token(model: Any) -> int:
    """Return the token that the decoder of an encoder-decoder model begins with."""
    settings = model.generation_config
    found = settings.decoder_start_token_id
    return int(settings.bos_token_id if found is None else found)


CAPTIONERS: Mapping[str, Captioner] = {
    "vision-encoder-decoder": Captioner(
        start=first_token,
        tokens=lambda model: {"decoder_start_token_id": first_token(model)},
    ),
    "blip": Captioner(
        start=lambda model: int(model.config.text_config.bos_token_id),
        tokens=lambda model: {"eos_token_id": model.config.text_config.sep_token_id},
        decoder=lambda model: model.text_decoder,
    ),
    "git": Captioner(start=lambda model: int(model.config.bos_token_id)),
}
"""Architecture → how it captions. Others of transformers' class answer to a prompt with the image in it."""


class CaptionEngine(LookingEngine):
    """Looks at images, and writes a text for each."""

    records: ClassVar[ValueRecords] = ValueRecords(keys=keys_of("image-to-text", VALUES, FACTS), values=VALUES)

    @classmethod
    def prepare(
        cls, spec: GenerateJobSpec, config: PreTrainedConfig, source: Path, field: str, folder: WorkspaceFolder
    ) -> None:
        """Check that the model captions, and save its image processor and tokenizer. Raises Failure if it does not."""
        if config.model_type not in CAPTIONERS:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: {config.model_type} answers to a prompt with an image in it, which rows of image-to-text do"
                f" not have; choose a model that captions images alone ({', '.join(CAPTIONERS)})",
            )
        super().prepare(spec, config, source, field, folder)
        read_tokenizer(source, field).save_pretrained(folder.prepared / TOKENIZER)

    @classmethod
    def check_pixels(cls, config: PreTrainedConfig, shape: tuple[int, ...], task: str) -> None:
        """Check nothing: such a model cannot look without writing."""

    def __init__(self, spec: GenerateJobSpec, model: PreTrainedModel, folder: WorkspaceFolder, batch_size: int) -> None:
        super().__init__(spec, model, folder, batch_size)
        tokenizer = read_tokenizer(folder.prepared / TOKENIZER, "spec.model")
        kind = CAPTIONERS[model.config.model_type]
        padding = tokenizer.pad_token_id or 0
        start, tokens, decoder = kind.start(model), kind.tokens(model), kind.decoder(model)
        self.decoder = Decoder(model, tokenizer, spec.text, start, padding, tokens, decoder)

    def work(self, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, a batch at a time. Beams are searched for one image alone."""
        for sample in samples:
            if settings_of(sample).num_beams > 1:
                pixels = self.pixels([sample])[:1].to(self.model.device, self.model.dtype)
                yield [output(self.decoder.search(sample, {"pixel_values": pixels}))]
        yield from super().work([sample for sample in samples if settings_of(sample).num_beams == 1])

    def look(self, samples: Sequence[Sample], pixels: torch.Tensor) -> list[Output]:
        texts = self.decoder.write(padded(samples, self.batch_size), {"pixel_values": pixels})
        return [output(text) for text in texts[: len(samples)]]


def output(text: Text) -> Output:
    """Return the output of a text that has ended."""
    facts = {"newTokens": len(text.new), "finishReason": text.finish}
    return Output(text.work, facts, values={"output": text.text()})
