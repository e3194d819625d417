"""Writes texts in slots: a text that ends leaves its slot to the next one, while the others go on.

All steps of a model have one shape: [slots, 1] tokens over caches of one capacity. Prompts are read before, alone or
with others of nearly the same length, in a shape that follows from their own length. So what a text is next to, and
when it is written, change no kernel and no bit of it. Each slot holds a text from position 0 on, and a mask hides what
follows; on CPUs each text has a cache of its own instead, where the model allows it (`apart`). This suits models whose
only memory is attention; `batching` finds out by running them.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from luthier_trainer.generation.apart import ApartLayer, Unfit, attending

SMALLEST_CAPACITY = 64  # tokens of a cache; larger ones are powers of two
SHORTEST_PROMPT = 16  # tokens that prompts are padded to where several are read at once; the next are powers of two
PREFILL_TOKENS = {"cpu": 64, "cuda": 1024}
"""Device → tokens that make a pass over a prompt worth it: shorter prompts are read together. On a CPU a matrix is read
from memory in the time of about ten tokens, on an H100 in that of about 300.
"""


class Written(Protocol):
    """A text that is being written."""

    prompt: list[int]
    new: list[int]

    @property
    def ended(self) -> bool:
        """Whether no further token follows."""


Text = TypeVar("Text", bound=Written)
Chooser = Callable[[Sequence[Any], torch.Tensor], None]
"""Adds a token to each text, from logits [slots, vocabulary]; None stands for an empty slot."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, each [slots, heads, capacity, width]."""

    is_compileable = True  # transformers then always makes a mask
    is_sliding = False

    def __init__(self, capacity: int, slots: torch.Tensor, positions: torch.Tensor) -> None:
        super().__init__()
        self.capacity, self.slots, self.positions = capacity, slots, positions

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the cache. Both tensors are [any, heads, any, width]."""
        size = len(self.slots)
        self.keys, self.values = (
            states.new_zeros(size, states.shape[1], self.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add one token to each slot, at its own position, and return the whole cache."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[self.slots, :, self.positions] = key_states[:, :, 0]
        self.values[self.slots, :, self.positions] = value_states[:, :, 0]
        return self.keys, self.values

    def hold(self, slot: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Put a prompt into a slot: keys and values [heads, tokens, width]."""
        if not self.is_initialized:
            self.lazy_initialization(keys[None], values[None])
        for cache, states in ((self.keys, keys), (self.values, values)):
            # What an earlier text has left is hidden, but 0 × NaN would be NaN.
            cache[slot].zero_()
            cache[slot, :, : states.shape[1]] = states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.capacity, 0

    def get_seq_length(self) -> int:
        return self.capacity - 1

    def get_max_length(self) -> int:
        return self.capacity


@dataclass(frozen=True)
class Read:
    """A prompt that was read, except for its last token. For each layer: keys and values [heads, tokens, width]."""

    text: Any
    layers: list[tuple[torch.Tensor, torch.Tensor]]


def capacity_for(tokens: int, context: int | None) -> int:
    """Return the capacity of the caches for a text of that many tokens, with its prompt."""
    rounded = max(SMALLEST_CAPACITY, 1 << (tokens - 1).bit_length())
    return rounded if context is None else max(tokens, min(rounded, context))


class Slots:
    """`size` slots of one model. `padding`: id of the padding token. `apart`: whether each text has its own cache."""

    def __init__(
        self,
        model: PreTrainedModel,
        size: int,
        padding: int,
        *,
        apart: bool = False,
        prefill_tokens: int | None = None,
    ) -> None:
        """Raises Unfit if the model cannot be run so."""
        parameters = inspect.signature(model.forward).parameters
        if not {"position_ids", "attention_mask", "past_key_values"} <= set(parameters):
            raise Unfit("its forward takes no positions")
        self.model, self.size, self.padding, self.device = model, size, padding, model.device
        self.prefill_tokens = PREFILL_TOKENS[self.device.type] if prefill_tokens is None else prefill_tokens
        self.last_logits = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self.masks = Masks(model)
        self.apart = apart
        if apart and not self.masks.allow_apart:
            raise Unfit("its attention is not over all tokens of a text alone")
        self.indices = torch.arange(size, device=self.device)
        self.computed = 0
        """Tokens that prompts have taken, with padding."""

    @torch.inference_mode()
    def write(self, texts: Sequence[Text], capacity: int, choose: Chooser) -> Iterator[list[Text]]:
        """Yield the texts as they end. The longest prompts are read first, so that memory is short early or never.

        `capacity`: of the caches, unless each text has its own.
        """
        waiting = deque(sorted(texts, key=lambda text: len(text.prompt), reverse=True))
        ready: deque[Read] = deque()
        slots: list[Text | None] = [None] * self.size
        positions = torch.zeros(self.size, dtype=torch.long, device=self.device)
        lengths = [0] * self.size
        cache = Cache(
            layer_class_to_replicate=lambda: (
                ApartLayer(lengths) if self.apart else SlotLayer(capacity, self.indices, positions)
            )
        )
        while True:
            for slot, held in enumerate(slots):
                if held is None and not ready and waiting:
                    ready.extend(self.read(waiting))
                if held is None and ready:
                    prompt = ready.popleft()
                    hold(cache, slot, prompt.layers)
                    slots[slot] = prompt.text
            if not any(slots):
                return
            choose(slots, self.step(slots, cache, positions, lengths, capacity))
            ended = [text for text in slots if text is not None and text.ended]
            slots = [None if text is None or text.ended else text for text in slots]
            if ended:
                yield ended

    def step(
        self,
        slots: Sequence[Written | None],
        cache: Cache,
        positions: torch.Tensor,
        lengths: list[int],
        capacity: int,
    ) -> torch.Tensor:
        """Return the logits after the last token of each slot, [slots, vocabulary]. Adds that token to the caches."""
        last = [self.padding if text is None else (text.new or text.prompt)[-1] for text in slots]
        lengths[:] = [0 if text is None else len(text.prompt) + len(text.new) for text in slots]
        positions.copy_(torch.tensor([max(0, length - 1) for length in lengths]))
        seen = {"apart": cache} if self.apart else {"attention_mask": self.masks.after(positions, capacity)}
        with attending(self.model) if self.apart else nullcontext():
            made = self.model(
                input_ids=torch.tensor(last, device=self.device)[:, None],
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
                **seen,
            )
        logits: torch.Tensor = made.logits[:, -1]
        return logits

    def shape(self, tokens: int) -> tuple[int, int]:
        """Return how many prompts of that many tokens are read at once, and the length that they are padded to."""
        padded = max(SHORTEST_PROMPT, 1 << (tokens - 1).bit_length())
        together = min(self.size, self.prefill_tokens // padded)
        # One alone needs no padding: its shape follows from it.
        return (together, padded) if together > 1 else (1, tokens)

    def read(self, waiting: deque[Text]) -> list[Read]:
        """Take texts from `waiting` that are read in one pass, and read their prompts. Raises Unfit."""
        tokens = len(waiting[0].prompt) - 1  # the last one is read by the first step, which needs its logits
        if tokens == 0:
            return [Read(waiting.popleft(), [])]
        rows, length = self.shape(tokens)
        texts = [waiting.popleft()]
        while len(texts) < rows and waiting and (more := len(waiting[0].prompt) - 1) and self.shape(more)[1] == length:
            texts.append(waiting.popleft())
        prompts = [text.prompt[:-1] for text in texts]
        prompts += [prompts[0]] * (rows - len(prompts))
        ids = [prompt + [self.padding] * (length - len(prompt)) for prompt in prompts]
        self.computed += rows * length
        # Without its configuration, so that layers with a window keep all tokens: the last ones may be padding.
        cache = DynamicCache()
        self.model(
            input_ids=torch.tensor(ids, device=self.device),
            # Given as `generate` gives them: models of RoBERTa's family count from the padding token's id themselves.
            position_ids=torch.arange(length, device=self.device).expand(rows, length),
            past_key_values=cache,
            use_cache=True,
            **self.last_logits,
        )
        if not all(type(layer) is DynamicLayer and layer.keys.shape[2] == length for layer in cache.layers):
            raise Unfit("it remembers a prompt by more than keys and values")
        return [
            Read(
                text,
                [
                    (layer.keys[row, :, : len(text.prompt) - 1], layer.values[row, :, : len(text.prompt) - 1])
                    for layer in cache.layers
                ],
            )
            for row, text in enumerate(texts)
        ]


def hold(cache: Cache, slot: int, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put a prompt into a slot of all layers."""
    while len(cache.layers) < len(layers):
        cache.layers.append(cache.layer_class_to_replicate())
    for layer, (keys, values) in zip(cache.layers, layers, strict=False):
        layer.hold(slot, keys, values)


class Masks:
    """The masks of one step, for each kind of layer of a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises Unfit if the model has layers of another kind."""
        config = model.config.get_text_config(decoder=True)
        self.window = getattr(config, "sliding_window", None)
        self.chunk = getattr(config, "attention_chunk_size", None)
        self.kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        kinds: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "full_attention": self._all,
            "sliding_attention": self._in_window,
            "chunked_attention": self._in_chunk,
        }
        if unknown := set(self.kinds) - set(kinds):
            raise Unfit(f"it has layers of the type {', '.join(sorted(unknown))}")
        self.by_kind = {kind: kinds[kind] for kind in self.kinds}
        self.only = self._in_window if self.window else self._in_chunk if self.chunk else self._all
        implementation = config._attn_implementation
        if implementation not in ("eager", "sdpa"):
            raise Unfit(f"its attention is {implementation}")
        self.added = torch.finfo(model.dtype).min if implementation == "eager" else None
        plain = self.only == self._all and set(self.kinds) <= {"full_attention"} and not model.config.sub_configs
        self.allow_apart = implementation == "sdpa" and plain
        """Whether each token sees all before it, in all layers, and one setting says by which kernel."""
        self.dtype = model.dtype

    def after(self, positions: torch.Tensor, capacity: int) -> torch.Tensor | dict[str, torch.Tensor]:
        """Return what a token at each of `positions` sees of a cache: [slots, 1, 1, capacity], by kind of layer."""
        held = torch.arange(capacity, device=positions.device)[None]
        own = positions[:, None]
        if self.by_kind:
            return {kind: self._form(mask(held, own)) for kind, mask in self.by_kind.items()}
        return self._form(self.only(held, own))

    def _all(self, held: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return held <= own

    def _in_window(self, held: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return (held <= own) & (held > own - self.window) if self.window else held <= own

    def _in_chunk(self, held: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return (held <= own) & (held // self.chunk == own // self.chunk)

    def _form(self, seen: torch.Tensor) -> torch.Tensor:
        """Return a mask as the attention of the model reads it: what is seen, or what is added to the scores."""
        seen = seen[:, None, None, :]
        if self.added is None:
            return seen
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill_(~seen, self.added)
