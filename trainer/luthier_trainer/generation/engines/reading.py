"""What the engines have in common that read texts: a model with its tokenizer, rows as tokens, and their padding.

What is made of the texts is another matter: see `answering` and `seq2seq`. An output has the same bits whatever its
neighbours are: all batches have one number of rows, and the length that a text is padded to depends only on the text.
Lengths are rounded up in steps of about an eighth, so that little is padding and few lengths share no batch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.tasks import TASKS
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.generation.batching import needs_to_be_alone, smallest_difference
from luthier_trainer.generation.engines.base import Batched
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.loading import load_with_adapters
from luthier_trainer.generation.records import ValueRecords
from luthier_trainer.generation.samples import Sample
from luthier_trainer.models.inspect import max_positions
from luthier_trainer.models.processors import read_tokenizer
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import beat
from luthier_trainer.runtime.notices import notice

SHORTEST = 16  # tokens; shorter texts are padded to it
ENCODED_AT_ONCE = 1000  # texts, between two heartbeats
NO_LIMIT = 10**9  # tokenizers whose files set no length have a larger one than any text


def rounded(length: int) -> int:
    """Return the length that a text of `length` tokens is padded to: the next of 16, 18, 20, ... 32, 36, 40, ... 64."""
    if length <= SHORTEST:
        return SHORTEST
    step = max(2, 1 << ((length - 1).bit_length() - 4))
    return -(-length // step) * step


@dataclass(frozen=True)
class Piece:
    """What the model reads at once: a text, or a part of a text that is longer than the model reads."""

    inputs: Mapping[str, Sequence[int]]
    """Name of an argument of the model → ids or flags, one for each token."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What the task needs to understand the answer, such as offsets of the tokens in the text."""

    @property
    def length(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Read:
    """What a row is read as, and how many of its tokens; or why it cannot be read."""

    pieces: Sequence[Piece]
    facts: Mapping[str, Any] = field(default_factory=dict)
    problem: str | None = None


class ReadingEngine(Batched):
    """Reads texts: as pieces, each as long as the model reads, that are padded together."""

    records: ClassVar[ValueRecords]
    window_rows: ClassVar[int] = 16_384
    """So that nearly all batches are full, although there are about 40 lengths that texts are padded to. Their tokens
    take 50 MB, with 100 tokens each.
    """
    needs_positions: ClassVar[bool] = False
    """Whether the task needs the positions of tokens in the text."""

    @classmethod
    def check(
        cls, spec: GenerateJobSpec, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, field: str
    ) -> None:
        """Check in `prepare` that the model and its tokenizer suit the job. Raises Failure if not."""
        if cls.needs_positions and not tokenizer.is_fast:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: its tokenizer ({type(tokenizer).__name__}) does not say where in a text a token is, and"
                f" {spec.task} needs that; choose a model with a tokenizer.json",
            )

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> ReadingEngine:
        """Return the engine with its model on the device. Raises Failure if it or an adapter cannot be loaded."""
        model = load_with_adapters(
            run.spec, Path(prepared.model_path), [Path(path) for path in prepared.adapter_paths], hardware
        )
        tokenizer = WorkspaceFolder(Path(run.workspace)).prepared / "tokenizer"
        return cls(run.spec, model, tokenizer if tokenizer.exists() else Path(prepared.model_path), batch_size)

    def __init__(self, spec: GenerateJobSpec, model: PreTrainedModel, processor: Path, batch_size: int) -> None:
        alone = needs_to_be_alone(model)
        self.spec, self.model, self.batch_size = spec, model, 1 if alone else batch_size
        self.tokenizer = read_tokenizer(processor, "spec.model")
        self.padding = self.tokenizer.pad_token_id or 0
        self.arguments = set(signature(model.forward).parameters)
        # Decoders answer at the last token that is not padding, and know it by its id.
        self.model.config.pad_token_id = self.padding
        limits = [self.tokenizer.model_max_length, max_positions(model.config) or NO_LIMIT]
        self.limit: int | None = limit if (limit := min(limits)) < NO_LIMIT else None
        self.encoded: dict[str, Mapping[str, Any]] = {}
        """Texts that were encoded with others, which is faster than one by one, until they are read."""
        self.found: dict[tuple[int, int], Read] = {}
        """What samples are read as, from the first question about them until they are made."""
        self.pads = not alone and self.ignores_padding()

    @abstractmethod
    def read(self, sample: Sample) -> Read:
        """Return what the model reads of a sample."""

    @abstractmethod
    def forward(self, pieces: Sequence[Piece], length: int) -> Sequence[torch.Tensor]:
        """Return what one pass of the model makes of pieces that are padded to `length` on the right.

        For each piece a tensor without what belongs to padding, fp32 on the CPU.
        """

    def text_of(self, sample: Sample) -> str | None:
        """Return the text that `read` passes to `whole_text`; None if it passes another one, or a second one."""
        return None

    def expect(self, samples: Sequence[Sample]) -> None:
        """Encode the texts of samples together."""
        texts = list(dict.fromkeys(text for sample in samples if (text := self.text_of(sample)) is not None))
        for first in range(0, len(texts), ENCODED_AT_ONCE):
            beat()
            some = texts[first : first + ENCODED_AT_ONCE]
            made = self.tokenizer(some, return_offsets_mapping=self.needs_positions, verbose=False)
            for i, text in enumerate(some):
                self.encoded[text] = {name: values[i] for name, values in made.items()}

    def read_once(self, sample: Sample) -> Read:
        """Return what the model reads of a sample. It is tokenised once."""
        if sample.key not in self.found:
            self.found[sample.key] = self.read(sample)
        return self.found[sample.key]

    def problem(self, sample: Sample) -> str | None:
        """Return why this sample can never be made; None if it can."""
        read = self.read_once(sample)
        if read.problem:
            del self.found[sample.key]
        return read.problem

    def group(self, sample: Sample) -> Hashable:
        """Return the length in tokens that the pieces of a sample are padded to."""
        return self.padded_length(max(piece.length for piece in self.read_once(sample).pieces))

    def padded_length(self, length: int) -> int:
        """Return the length that a text of `length` tokens is padded to."""
        if not self.pads:
            return length
        return rounded(length) if self.limit is None else max(length, min(rounded(length), self.limit))

    def batch(self, pieces: Sequence[Piece], length: int) -> dict[str, torch.Tensor]:
        """Return the arguments of the model, int64 [pieces, length], padded on the right."""
        fills = {"input_ids": self.padding, "token_type_ids": self.tokenizer.pad_token_type_id}
        return {
            name: torch.tensor(
                [[*piece.inputs[name], *[fills.get(name, 0)] * (length - piece.length)] for piece in pieces],
                device=self.model.device,
            )
            for name in pieces[0].inputs
        }

    def ignores_padding(self) -> bool:
        """Return whether a text gets the same answer alone and padded beside another one; gives notice if not.

        Some architectures have no mask for padding, or include it in means and convolutions.
        """
        words = self.tokenizer("The quick brown fox jumps over the lazy dog")
        short = Piece({name: ids[: len(ids) // 2] for name, ids in self.model_inputs(words).items()})
        long = Piece(self.model_inputs(words))
        if not short.length or (self.limit is not None and long.length + 2 > self.limit):
            return False
        alone, padded = self.forward([short], short.length)[0], self.forward([short, long], long.length + 2)[0]
        scale = max(float(alone.abs().max()), 1e-6)
        if float((alone - padded).abs().max()) <= smallest_difference(self.model) * scale:
            return True
        notice(
            f"spec.model: {self.model.config.model_type} answers otherwise when a text is padded. So only texts of"
            " equal length share a batch, which is slower"
        )
        return False

    def model_inputs(self, encoding: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return what the model takes of an encoded text."""
        taken = self.arguments & set(self.tokenizer.model_input_names)
        return {name: list(values) for name, values in encoding.items() if name in taken}

    def whole_text(self, text: str, second: str | None = None) -> Read:
        """Return a text as one piece, and a second one that follows it whole.

        A text that is too long is cut if the job says so, and refused otherwise.
        """
        encoding = self.encoded.pop(text, None) if second is None else None
        if encoding is None:
            encoding = self.tokenizer(text, second, return_offsets_mapping=self.needs_positions, verbose=False)
        length, limit = len(encoding["input_ids"]), self.limit
        if limit is not None and length > limit:
            if not self.spec.inputs.truncate:
                return Read([], problem=self.too_long(length))
            encoding = self.tokenizer(
                text,
                second,
                truncation="only_first",
                max_length=limit,
                return_offsets_mapping=self.needs_positions,
                verbose=False,
            )
        piece = Piece(self.model_inputs(encoding), {"encoding": encoding} if self.needs_positions else {})
        return Read([piece], {"tokens": length, "truncated": length > piece.length})

    def too_long(self, length: int) -> str:
        """Return the error of a row of so many tokens."""
        role = TASKS[self.spec.task].generated.main_role
        return (
            f"{role}: {length} tokens are more than the model's {self.limit}; shorten it, or set inputs.truncate: true"
        )
