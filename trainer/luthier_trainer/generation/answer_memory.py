"""What a model of transformers needs of a GPU to answer to texts, images or audio, computed on the meta device.

Shapes alone are computed, by the same classes as in the run. What kernels take for themselves is not in it, but for a
share (`gpu_memory.FRAGMENTS`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig

from luthier_api.methods import QUANTIZATIONS, QuantizationType
from luthier_api.status import Memory
from luthier_api.tasks import TASKS
from luthier_trainer.generation.apart import Unfit
from luthier_trainer.generation.batching import UNFIT
from luthier_trainer.generation.sampling import drawn
from luthier_trainer.generation.slots import PREFILL_TOKENS, Slots, capacity_for
from luthier_trainer.models import inspect
from luthier_trainer.models.fsdp import blocks
from luthier_trainer.models.generation_trace import Generation, Search, searched, written
from luthier_trainer.models.memory import Forward, Setting, prepared, quantised_layers, size_of
from luthier_trainer.models.step_trace import Ledger
from luthier_trainer.workspace.gpu_memory import CONTEXT_BYTES, FRAGMENTS, PROCESS_BYTES, WORKSPACE_BYTES

FOUR_BITS = 4


@dataclass(frozen=True)
class Work:
    """What is worked on at once, as it matters to memory."""

    rows: int
    """Texts, images or audio files."""
    read: tuple[int, ...]
    """Shape of what is read of one: the tokens of the longest text, as it is padded, or of the input of an image or of
    audio."""
    written: int
    """Tokens that are written after it, at most; 0 if none are."""
    beams: int
    draws: bool
    """Whether tokens are drawn."""


@dataclass(frozen=True)
class Held:
    """What is there beside the weights: bytes."""

    cache: int
    """Keys and values, from the first row to the last."""
    most: int
    """The most at once, the cache included."""


@dataclass
class Text:
    """Stands for a text in a slot. It ends with its first token."""

    prompt: list[int]
    new: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return bool(self.new)


def memory_of(
    config: PreTrainedConfig,
    task: str,
    work: Work,
    dtype: torch.dtype,
    kind: QuantizationType | None,
    offload: bool,
) -> Memory:
    """Return what the model needs of a GPU, and of the memory of a node.

    `kind`: the type of its linear layers, if they are quantised. `offload`: whether its layers wait elsewhere. Raises
    whatever an architecture raises that cannot be computed so.
    """
    model: Any = inspect.skeleton(config, task, inspect.MODEL)
    torch.nn.Module.to(model, dtype).eval()
    if getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = 0  # decoders with a head want one, and engines set it, too
    quantised = quantised_layers(model) if kind else {}
    few_bits = {id(layer.weight) for layer in quantised.values()}

    def size(module: Any) -> int:
        weights = sum(size_of(weight, kind if id(weight) in few_bits else None) for weight in module.parameters())
        return weights + sum(buffer.nbytes for buffer in module.buffers())

    every, layers = size(model), [size(block) for block in blocks(model)]
    there = every - sum(layers) + max(layers, default=0) if offload else every
    # Products with weights in 4 bits are computed with a copy of the layer in the type of the computation.
    copied = quantised.values() if kind and QUANTIZATIONS[kind].bits == FOUR_BITS else ()
    held = held_by(model, task, work)
    terms = {
        "weights": there,
        "unpacked layer": max((layer.weight.numel() * dtype.itemsize for layer in copied), default=0),
        "keys and values": held.cache,
        "activations": held.most - held.cache,
        "fragments": math.ceil(FRAGMENTS * (held.most - held.cache)),
        "workspace": WORKSPACE_BYTES,
        "context": CONTEXT_BYTES,
    }
    terms = {name: value for name, value in terms.items() if value}
    return Memory(gpu=terms, gpu_bytes=sum(terms.values()), host_bytes=PROCESS_BYTES["gpu"] + every)


def held_by(model: Any, task: str, work: Work) -> Held:
    """Return what is there beside the weights while the model does the task.

    Raises ValueError if it writes otherwise than a decoder, alone or after an encoder.
    """
    causal = TASKS[task].auto_model == "CausalLM"
    if work.written and not causal and not model.config.is_encoder_decoder:
        raise ValueError(f"{model.config.model_type} is not of an encoder and a decoder")
    if causal and work.beams == 1:
        try:
            return held_in_slots(model, work)
        except (Unfit, *UNFIT):
            pass  # it is not run in slots either
    ledger, autocast = prepared(model, (), Setting("cuda", None, padded=True))
    forward = Forward(model, autocast)
    with torch.no_grad(), autocast.in_place(), ledger, autocast:
        if causal:
            (prompt,) = work.read
            generation = Generation(prompt, work.written, lambda logits: choose(logits, work.draws))
            written(forward, generation, work.rows * work.beams)
        elif work.written:
            searched(forward, Search(inputs_of(model, work), work.written, work.beams))
        else:
            forward(**inputs_of(model, work))
    return Held(0, most_of(ledger))


def inputs_of(model: Any, work: Work) -> dict[str, torch.Tensor]:
    """Return what the model reads of all rows, on the meta device."""
    shape, is_text = (work.rows, *work.read), len(work.read) == 1
    read = torch.empty(shape, dtype=torch.long if is_text else model.dtype, device="meta")
    return {model.main_input_name: read} | ({"attention_mask": torch.empty_like(read)} if is_text else {})


def held_in_slots(model: Any, work: Work) -> Held:
    """Return what is there while texts are written in slots.

    As many prompts are read at once as in the run, and then as many again, beside the caches of all slots.
    """
    ledger, autocast = prepared(model, (), Setting("cuda", None, padded=True))
    slots = Slots(model, work.rows, 0, prefill_tokens=PREFILL_TOKENS["cuda"])
    (read,) = work.read
    together, _ = slots.shape(max(1, read - 1))
    caches: list[int] = []

    def choose_all(held: Sequence[Text | None], logits: torch.Tensor) -> None:
        caches.append(ledger.bytes - logits.nbytes)
        choose(logits, work.draws)
        for text in held:
            if text is not None:
                text.new.append(0)

    capacity = capacity_for(read + work.written, inspect.max_positions(model.config))
    texts = [Text([0] * read) for _ in range(2 * together)]
    with torch.no_grad(), autocast.in_place(), ledger, autocast:
        for _ in slots.write(texts, capacity, choose_all):
            pass
    return Held(min(caches), most_of(ledger))


def choose(logits: torch.Tensor, draws: bool) -> torch.Tensor:
    """Compute what choosing a token takes (`sampling.Choice`), from logits [texts, vocabulary]."""
    scores = logits.to(torch.float32, copy=True)
    if not draws:
        return scores.argmax(-1)
    return drawn(scores, torch.empty(len(scores), dtype=torch.float64, device=scores.device))


def most_of(ledger: Ledger) -> int:
    return max((held for held, _ in ledger.moments), default=0)
