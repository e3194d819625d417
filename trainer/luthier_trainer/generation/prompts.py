"""Embeddings of prompts, as pipelines of diffusers take them. Each distinct text is encoded once.

A text is encoded alone, so that its embedding does not depend on its neighbours. CLIP reads 77 tokens at a time. With
`image.longPrompts: chunk` a longer prompt is encoded in several parts, whose embeddings follow each other; a shorter
text beside it is filled up with empty parts. T5, beside it in Stable Diffusion 3 and FLUX, reads a text at once, up to
a number of tokens that the model was trained with. No text is ever cut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from luthier_api.task_settings import ImageSettings
from luthier_trainer.generation.samples import Sample
from luthier_trainer.models.pipelines import TOKENIZERS, denoiser_of

KEPT_BYTES = 256 * 2**20
"""Of embeddings on the device: 700 texts of Stable Diffusion XL in 16 bits, for prompts with several images."""
KEPT_LENGTHS = 10_000  # texts whose number of parts is remembered


@dataclass(frozen=True)
class Reader:
    """A text encoder, by how much of a text it reads."""

    tokenizer: Any
    room: int
    """Tokens of a text that it reads at once, beside those of begin and end."""
    in_parts: bool = True
    """Whether it can read a longer text in parts."""


def strict(readers: Sequence[Reader], settings: ImageSettings) -> list[Reader]:
    """Return those for which a text can be too long."""
    return [reader for reader in readers if settings.long_prompts == "refuse" or not reader.in_parts]


@dataclass(frozen=True)
class Embedding:
    """What the text encoders make of one text."""

    tokens: torch.Tensor
    """[1, 77 × parts, width]"""
    pooled: torch.Tensor | None
    """[1, width] of the first part; None if the model takes none."""

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.tokens.nbytes + (0 if self.pooled is None else self.pooled.nbytes)


class Prompts:
    """Encodes the prompts of samples for `pipe`, a pipeline of Stable Diffusion (XL)."""

    clips: ClassVar[Sequence[str]] = ("", "_2")
    """Ends of diffusers' names of those text encoders that are CLIP."""

    def __init__(self, pipe: Any, settings: ImageSettings) -> None:
        self.pipe, self.settings = pipe, settings
        pairs = [
            (getattr(pipe, f"tokenizer{end}", None), getattr(pipe, f"text_encoder{end}", None)) for end in self.clips
        ]
        self.encoders: list[tuple[Any, Any]] = [
            (tokenizer, model) for tokenizer, model in pairs if tokenizer is not None
        ]
        tokenizers = [getattr(pipe, name, None) for name in TOKENIZERS]
        self.readers = self.readers_of(
            [tokenizer for tokenizer in tokenizers if tokenizer is not None], denoiser_of(pipe)
        )
        self.strict = strict(self.readers, settings)
        self.unread = lru_cache(KEPT_LENGTHS)(lambda text: unread_tokens(self.strict, text))
        # Stable Diffusion XL was trained on the layer before the last, and with the pooled output of the last encoder.
        self.is_xl = hasattr(pipe, "tokenizer_2")
        self.is_guided = settings.guidance > 1 and self._reads_negative_prompts()
        self.kept: OrderedDict[tuple[str, int], Embedding] = OrderedDict()
        self.parts = lru_cache(KEPT_LENGTHS)(self._parts)

    @classmethod
    def readers_of(cls, tokenizers: Sequence[Any], denoiser: Any) -> list[Reader]:
        """Return the text encoders of a pipeline, by their tokenizers."""
        return [Reader(tokenizer, room(tokenizer)) for tokenizer in tokenizers]

    def _reads_negative_prompts(self) -> bool:
        return self.pipe.unet.config.time_cond_proj_dim is None

    def _parts(self, text: str) -> int:
        return max(parts(tokenizer, text) for tokenizer, _ in self.encoders)

    def problem(self, sample: Sample) -> str | None:
        """Return why the prompts of a sample cannot be read to their end; None if they can."""
        for name, text in (("prompt", sample.prompt), ("negative prompt", self._negative(sample))):
            if self.unread(text):
                at_once = [reader for reader in self.readers if not reader.in_parts]
                remedy = "" if unread_tokens(at_once, text) else ", or set image.longPrompts: chunk"
                return f"the {name} has {self.unread(text)} tokens more than the text encoders read; shorten it{remedy}"
        return None

    def _negative(self, sample: Sample) -> str:
        """Return the negative prompt, or an empty text if there is none or if it has no effect."""
        return (sample.negative_prompt or "") if self.is_guided else ""

    def size(self, sample: Sample) -> int:
        """Return the number of parts of a sample's embeddings, which a batch must have in common."""
        return max(self.parts(sample.prompt), self.parts(self._negative(sample)))

    def arguments(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the embeddings of samples of one size, as arguments of the pipeline."""
        size = self.size(samples[0])
        given = _stacked("", [self.embedding(sample.prompt, size) for sample in samples])
        if not self.is_guided:
            return given
        return given | _stacked("negative_", [self._negative_embedding(sample, size) for sample in samples])

    def _negative_embedding(self, sample: Sample, size: int) -> Embedding:
        if sample.negative_prompt is None and getattr(self.pipe.config, "force_zeros_for_empty_prompt", False):
            like = self.embedding(sample.prompt, size)
            return Embedding(
                torch.zeros_like(like.tokens), None if like.pooled is None else torch.zeros_like(like.pooled)
            )
        return self.embedding(self._negative(sample), size)

    def embedding(self, text: str, size: int) -> Embedding:
        """Return the embedding of a text in `size` parts."""
        key = text, size
        if key not in self.kept:
            self.kept[key] = self._encode(text, size)
        self.kept.move_to_end(key)
        while len(self.kept) > 1 and sum(kept.nbytes for kept in self.kept.values()) > KEPT_BYTES:
            self.kept.popitem(last=False)
        return self.kept[key]

    @torch.inference_mode()
    def _encode(self, text: str, size: int) -> Embedding:
        read, pooled = [], None
        for tokenizer, model in self.encoders:
            hidden = []
            for ids in token_ids(tokenizer, text, size):
                made = model(torch.tensor([ids], device=self.pipe._execution_device), output_hidden_states=self.is_xl)
                hidden.append(made.hidden_states[-2] if self.is_xl else made[0])
                if self.is_xl and pooled is None and made[0].ndim == 2:
                    pooled = made[0]
            read.append(torch.cat(hidden, dim=1))
        return Embedding(torch.cat(read, dim=-1), pooled)


def _stacked(prefix: str, embeddings: Sequence[Embedding]) -> dict[str, torch.Tensor]:
    """Return embeddings as arguments of the pipeline whose names begin with `prefix`."""
    given = {f"{prefix}prompt_embeds": torch.cat([embedding.tokens for embedding in embeddings])}
    pooled = [embedding.pooled for embedding in embeddings if embedding.pooled is not None]
    return given | ({f"{prefix}pooled_prompt_embeds": torch.cat(pooled)} if pooled else {})


def room(tokenizer: Any) -> int:
    """Return how many tokens of a text fit into one part, beside those of its begin and end."""
    return int(tokenizer.model_max_length) - 2


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a whole text, without begin and end."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])


def parts(tokenizer: Any, text: str) -> int:
    """Return the number of parts in which a text is encoded; an empty one has one."""
    return max(1, -(-len(plain_ids(tokenizer, text)) // room(tokenizer)))


def unread_tokens(readers: Sequence[Reader], text: str) -> int:
    """Return how many tokens of a text are not read at once, by the reader that reads the least of it."""
    unread = (len(plain_ids(reader.tokenizer, text)) - reader.room for reader in readers)
    return max(0, *unread, 0)


def token_ids(tokenizer: Any, text: str, size: int) -> list[list[int]]:
    """Return `size` parts of `model_max_length` token ids, each with begin, end and padding."""
    ids, length = plain_ids(tokenizer, text), room(tokenizer)
    found = []
    for i in range(size):
        part = [tokenizer.bos_token_id, *ids[i * length : (i + 1) * length], tokenizer.eos_token_id]
        found.append(part + [tokenizer.pad_token_id] * (length + 2 - len(part)))
    return found
