"""Determines how a model may work on several texts at once, by running the model.

Models whose only memory is attention are run in slots (`slots`), where a text that ends makes room for the next one.
The others go through `generate` in batches that begin and end together. There, prompts of different lengths can share a
batch if the shorter ones are padded on the left. This is correct only for models that mask the padding and count
positions from the first real token. RecurrentGemma reads padding like text, the decoders of BART's family count
positions from the padding, and RWKV (transformers 5.23) mixes the states of several texts even without padding. None of
them raises an error or a warning.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from luthier_api.exitcodes import ExitCode
from luthier_trainer.generation.apart import Unfit
from luthier_trainer.generation.slots import Slots, capacity_for
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

Sharing = Literal["slots apart", "slots", "any length", "equal length", "none"]
"""What texts may share: steps of a model, at any time, with caches of their own or of one capacity; a batch from
beginning to end, with prompts of any or of equal length; or nothing.
"""

STEPS = 3  # new tokens: the first depends on the prompt, the others also on the cache
SMALLEST = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.02}
"""The smallest difference that counts, in standard deviations of the logits.

Measured with two layers of 150 architectures: padding that is ignored changes the logits by at most 2e-6 (fp32), 0.005
(fp16) and 0.01 (bf16); padding that is read changes them by at least 0.03.
"""
ROUNDING = 4
"""The limit, as a multiple of the effect of another shape, which is only rounding and grows with the number of layers.

Measured with 4 and 32 layers in bf16: padding that is ignored has at most 1.2 times that effect.
"""
UNFIT = (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError)
"""Exceptions of a model that cannot run with given inputs. A RuntimeError may come from the GPU instead."""


class Forced(LogitsProcessor):
    """Makes `generate` take the given tokens, whatever the logits, so that two runs can be compared step by step."""

    def __init__(self, tokens: Sequence[int], prompt_length: int) -> None:
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt_length]] = 0.0
        return forced


class ForcedText:
    """A text whose tokens are given, with the logits that they were given after."""

    def __init__(self, prompt: Sequence[int], follow: Sequence[int]) -> None:
        self.prompt, self.follow = list(prompt), list(follow)
        self.new: list[int] = []
        self.logits: list[torch.Tensor] = []

    @property
    def ended(self) -> bool:
        return len(self.new) == len(self.follow)

    def take(self, logits: torch.Tensor) -> None:
        self.logits.append(logits)
        self.new.append(self.follow[len(self.new)])


def find_sharing(model: PreTrainedModel, prompt: Sequence[int], padding: int, length: int) -> Sharing:
    """Return what texts may share: that with which the logits after `prompt` are the same as alone.

    `padding`: id of the padding token. `length`: the length that prompts are padded to. A notice is given if not all
    prompts may share a batch. Raises Failure if the model cannot generate at all.
    """
    if not STEPS <= len(prompt) < length:
        return "equal length"
    kind = model.config.model_type
    try:
        alone = step_logits(model, [prompt], padding, len(prompt))
    except UNFIT as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise Failure(
            ExitCode.INVALID_SPEC, f"spec.model: the {kind} can be loaded, but not generate: {what}"
        ) from error
    if needs_to_be_alone(model):
        return "none"
    smallest = smallest_difference(model)
    rounding = difference(alone[:1], followed_logits(model, prompt, padding, length))
    limit = max(smallest, ROUNDING * rounding) if rounding < torch.inf else smallest
    # The second text of the batch has the full length here, and the length of the prompt below.
    longer = [*prompt, *reversed(prompt)] * length
    ways: tuple[Sharing, ...] = ("slots apart", "slots") if model.device.type == "cpu" else ("slots",)
    for way in ways:
        if slots_effect(model, alone, prompt, longer[: length - STEPS], padding, apart=way == "slots apart") <= limit:
            return way
    padded = effect(model, alone, [prompt, longer[:length]], padding, length)
    if padded <= limit:
        return "any length"
    even = effect(model, alone, [prompt, prompt[::-1]], padding, len(prompt))
    what = (
        f"spec.model: {kind} does not write the same in a batch as alone: next to a longer prompt its logits move by"
        f" {padded:.2g} of their standard deviation"
    )
    if even <= limit:
        notice(f"{what}. So only prompts of equal length share a batch, and prompts of many lengths take longer")
        return "equal length"
    notice(
        f"{what}, and next to one of equal length by {even:.2g}. So prompts are worked on one by one, which takes"
        " longer; spec.batchSize has no effect"
    )
    return "none"


def smallest_difference(model: PreTrainedModel) -> float:
    """Return the smallest difference of the logits that counts, in standard deviations."""
    coarse = SMALLEST[torch.bfloat16]
    return coarse if getattr(model, "is_quantized", False) else SMALLEST.get(model.dtype, coarse)


def needs_to_be_alone(model: PreTrainedModel) -> bool:
    """Return whether rows must be worked on one by one, as the model rounds a row by others. Gives notice if so."""
    if not mixes_rows(model):
        return False
    notice(
        "spec.model: LLM.int8() (bitsandbytes 0.50) rounds the activations of a row by those of all rows beside it. So"
        " rows are worked on one by one, which takes longer; spec.batchSize has no effect"
    )
    return True


def mixes_rows(model: PreTrainedModel) -> bool:
    """Return whether what a row holds decides how others are rounded.

    LLM.int8() computes a column in 16 bits if any row of the batch has an outlier there.
    """
    return any(type(m).__name__ == "Linear8bitLt" and m.state.threshold > 0 for m in model.modules())


def slots_effect(
    model: PreTrainedModel, alone: torch.Tensor, prompt: Sequence[int], other: Sequence[int], padding: int, apart: bool
) -> float:
    """Return the difference of the logits after `prompt` in a slot to `alone`; infinite if the model cannot run so.

    It follows another text into its slot, beside `other`, and all prompts are read with padding. `apart`: each text has
    its own cache.
    """
    follow = prompt[-STEPS:]
    texts = [ForcedText(other, follow), ForcedText(other[:-1], follow[:1]), ForcedText(prompt, follow)]

    def choose(held: Sequence[ForcedText | None], logits: torch.Tensor) -> None:
        for row, text in enumerate(held):
            if text is not None:
                text.take(logits[row].double())

    try:
        slots = Slots(model, 2, padding, apart=apart, prefill_tokens=2 * (len(other) + STEPS))
        for _ in slots.write(texts, capacity_for(len(other) + STEPS, None), choose):
            pass
        return difference(alone, torch.stack(texts[-1].logits))
    except (Unfit, RuntimeError, *UNFIT):
        return torch.inf


def effect(
    model: PreTrainedModel, alone: torch.Tensor, prompts: Sequence[Sequence[int]], padding: int, length: int
) -> float:
    """Return the difference of the logits after the first of `prompts` to `alone`; infinite if the model cannot run.

    `padding`: id of the padding token. `length`: the length that prompts are padded to.
    """
    try:
        return difference(alone, step_logits(model, prompts, padding, length))
    except UNFIT:
        return torch.inf


def difference(alone: torch.Tensor, other: torch.Tensor) -> float:
    """Return the root mean square of the difference, in standard deviations of `alone`, at the step with the largest.

    Both tensors: [steps, vocabulary].
    """
    moved = (alone - other).square().mean(-1).sqrt() / alone.std(-1)
    # NaN counts as a difference. A mask that is all padding can produce it.
    return float(moved.nan_to_num(torch.inf).max())


@torch.inference_mode()
def step_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], padding: int, length: int) -> torch.Tensor:
    """Return the logits of `STEPS` new tokens after the first of `prompts`, float64 [STEPS, vocabulary].

    All prompts are padded on the left to `length`.
    """
    missing = [length - len(prompt) for prompt in prompts]
    made = model.generate(
        input_ids=torch.tensor(
            [[padding] * gap + list(prompt) for gap, prompt in zip(missing, prompts, strict=True)], device=model.device
        ),
        attention_mask=torch.tensor([[0] * gap + [1] * (length - gap) for gap in missing], device=model.device),
        logits_processor=LogitsProcessorList([Forced(prompts[0][-STEPS:], length)]),
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack([logits[0] for logits in made.logits]).double()


@torch.inference_mode()
def followed_logits(model: PreTrainedModel, prompt: Sequence[int], padding: int, length: int) -> torch.Tensor:
    """Return the logits after `prompt` when padding follows it, float64 [1, vocabulary].

    A causal model does not see what follows, so these logits differ from those of the prompt alone only by rounding.
    Positions are those that `generate` gives: models of RoBERTa's family count others themselves, and the difference
    would hide any mistake.
    """
    missing = length - len(prompt)
    given = {}
    if "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.arange(length, device=model.device)[None]
    ids = torch.tensor([list(prompt) + [padding] * missing], device=model.device)
    mask = torch.tensor([[1] * len(prompt) + [0] * missing], device=model.device)
    return model(input_ids=ids, attention_mask=mask, **given).logits[:, len(prompt) - 1].double()
