"""Embeddings of prompts for Stable Diffusion 3 and FLUX, whose text encoders are CLIP and T5.

T5 is given each text filled up to one length, which is not masked: so the length is part of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from luthier_trainer.generation.prompts import Embedding, Prompts, Reader, token_ids
from luthier_trainer.generation.samples import Sample

SD3_TOKENS = 256  # of T5, as the pipeline's `max_sequence_length` by default
FLUX_TOKENS = 512  # likewise, FLUX.1 dev
SCHNELL_TOKENS = 256  # FLUX.1 schnell was distilled with shorter texts


def t5_reader(tokenizer: Any, tokens: int) -> Reader:
    """Return the reader of T5 for texts of `tokens` tokens, of which one ends the text."""
    return Reader(tokenizer, tokens - 1, in_parts=False)


def flux_tokens(transformer: Any) -> int:
    """Return how many tokens T5 reads for a FLUX: fewer for the one that was distilled to few steps."""
    return FLUX_TOKENS if transformer.config.guidance_embeds else SCHNELL_TOKENS


class SD3Prompts(Prompts):
    """Encodes prompts for a pipeline of Stable Diffusion 3: two CLIPs side by side, and T5 after them."""

    @classmethod
    def readers_of(cls, tokenizers: Sequence[Any], denoiser: Any) -> list[Reader]:
        t5 = [t5_reader(tokenizer, SD3_TOKENS) for tokenizer in tokenizers[2:]]
        return [*super().readers_of(tokenizers[:2], denoiser), *t5]

    def _reads_negative_prompts(self) -> bool:
        return True

    @torch.inference_mode()
    def _encode(self, text: str, size: int) -> Embedding:
        read, pooled = [], []
        for tokenizer, model in self.encoders:
            made = [
                model(torch.tensor([ids], device=self.pipe._execution_device), output_hidden_states=True)
                for ids in token_ids(tokenizer, text, size)
            ]
            read.append(torch.cat([part.hidden_states[-2] for part in made], dim=1))
            pooled.append(made[0].text_embeds)
        clip = torch.cat(read, dim=-1)
        width = self.pipe.transformer.config.joint_attention_dim
        if self.pipe.text_encoder_3 is None:
            t5 = clip.new_zeros(1, SD3_TOKENS, width)  # as the pipeline has it without T5
        else:
            t5 = read_by_t5(self.pipe, self.pipe.tokenizer_3, self.pipe.text_encoder_3, text, SD3_TOKENS)
        padded = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
        return Embedding(torch.cat([padded, t5.to(clip.dtype)], dim=1), torch.cat(pooled, dim=-1))


class FluxPrompts(Prompts):
    """Encodes prompts for a pipeline of FLUX: T5, and the pooled output of CLIP for the first part of the text."""

    clips: ClassVar[Sequence[str]] = ("",)

    @classmethod
    def readers_of(cls, tokenizers: Sequence[Any], denoiser: Any) -> list[Reader]:
        return [*super().readers_of(tokenizers[:1], denoiser), t5_reader(tokenizers[1], flux_tokens(denoiser))]

    def _reads_negative_prompts(self) -> bool:
        return False

    def problem(self, sample: Sample) -> str | None:
        if sample.negative_prompt:
            return "negativePrompt: FLUX reads none, because its guidance is an input of the model; remove it"
        return super().problem(sample)

    def size(self, sample: Sample) -> int:
        """Return 1: T5 reads all texts at one length."""
        return 1

    @torch.inference_mode()
    def _encode(self, text: str, size: int) -> Embedding:
        tokenizer, model = self.encoders[0]
        ids = token_ids(tokenizer, text, size)[0]
        pooled = model(torch.tensor([ids], device=self.pipe._execution_device)).pooler_output
        tokens = flux_tokens(self.pipe.transformer)
        return Embedding(read_by_t5(self.pipe, self.pipe.tokenizer_2, self.pipe.text_encoder_2, text, tokens), pooled)


def read_by_t5(pipe: Any, tokenizer: Any, model: Any, text: str, tokens: int) -> torch.Tensor:
    """Return what T5 makes of a text that it reads to its end, [1, tokens, width]."""
    ids = tokenizer(text, padding="max_length", max_length=tokens, truncation=False, verbose=False)["input_ids"]
    read: torch.Tensor = model(torch.tensor([ids], device=pipe._execution_device))[0]
    return read
