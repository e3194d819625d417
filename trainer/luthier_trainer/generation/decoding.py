"""Writes texts with `generate` of transformers, for models that make them of something else: a text, or an image."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier_api.task_settings import TextSettings
from luthier_trainer.generation.samples import Sample
from luthier_trainer.generation.sampling import PENALTIES, Choice, Chosen, Ended, Heartbeat, chain_of
from luthier_trainer.generation.texts import Text
from luthier_trainer.runtime.notices import notice

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


class Decoder:
    """Writes texts that begin with the token `start`.

    `tokens`: more tokens for the settings of generation, by their names there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: TextSettings,
        start: int,
        padding: int,
        tokens: Mapping[str, Any],
        decoder: PreTrainedModel | None = None,
    ) -> None:
        """`decoder`: the part of the model that has the settings of generation; None: the model itself."""
        self.model, self.tokenizer, self.start, self.padding = model, tokenizer, start, padding
        holder = decoder or model
        own = copy.deepcopy(holder.generation_config)
        kept = {name: value for name in TOKENS_OF_MODEL if (value := getattr(own, name, None)) is not None}
        if (own.num_beams or 1) > 1 and settings.num_beams == 1:
            notice(
                f"spec.text.numBeams: the model's own settings ask for {own.num_beams} beams, and this job takes the"
                f" likeliest token, or draws one, at each step; set numBeams: {own.num_beams} to search as they do"
            )
        holder.generation_config = GenerationConfig(
            **{**kept, **tokens}, max_new_tokens=settings.max_new_tokens, do_sample=False, pad_token_id=padding
        )
        ends = holder.generation_config.eos_token_id
        self.ends = frozenset(ends if isinstance(ends, list) else [ends]) - {None}
        self.choice = Choice()

    def text(self, sample: Sample) -> Text:
        """Return the text that is made of a sample, before its first token."""
        settings = settings_of(sample)
        text = Text([self.start], settings, sample.seed or 0, self.ends, self.tokenizer, work=sample)
        text.penalties = chain_of(PENALTIES, settings, text)
        return text

    @torch.inference_mode()
    def write(self, samples: Sequence[Sample], inputs: Mapping[str, torch.Tensor]) -> list[Text]:
        """Return the texts of samples. `inputs`: of the model, a row for each of them."""
        texts = [self.text(sample) for sample in samples]
        self.model.generate(
            **inputs,
            logits_processor=[Chosen(texts, self.choice, self.padding)],
            stopping_criteria=[Ended(texts)],
            max_new_tokens=max(text.settings.max_new_tokens for text in texts),
        )
        return texts

    @torch.inference_mode()
    def search(self, sample: Sample, inputs: Mapping[str, torch.Tensor]) -> Text:
        """Return the text of a sample by beam search: transformers' own, over this sample alone."""
        text, settings = self.text(sample), settings_of(sample)
        made = self.model.generate(
            **inputs,
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
        return text


def settings_of(sample: Sample) -> TextSettings:
    """Return the settings of a sample, with what its row overrides."""
    assert isinstance(sample.settings, TextSettings), "those of its task"
    return sample.settings
