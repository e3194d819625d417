"""Which prompts a model may be given in one batch, found out by running it.

Prompts of different lengths share a batch when the shorter ones are padded on the left. That is right only for models
that mask the padding and count positions from the first real token. RecurrentGemma reads padding like text, the
decoders of BART's family count positions from it on, and RWKV (transformers 5.23) mixes up the states of several texts
even without padding. None of them reports anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from luthier_api.exitcodes import ExitCode
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice

Sharing = Literal["any length", "equal length", "none"]
"""Which prompts share a batch."""

STEPS = 3  # new tokens: the first reads the prompt, the others the cache as well
SMALLEST = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.02}
"""In standard deviations of the logits. Measured with two layers of 150 architectures: padding that is ignored moves
them by at most 2e-6, 0.005 and 0.01, padding that is read by at least 0.03.
"""
ROUNDING = 4
"""How often the effect of another shape, which is rounding alone and grows with the layers. Measured with 4 and 32
layers in bf16: at most 1.2 times.
"""
UNFIT = (ValueError, TypeError, KeyError, AttributeError, IndexError, NotImplementedError)
"""What a model raises that cannot do what it is asked; a RuntimeError may be the GPU's."""


class Forced(LogitsProcessor):
    """Makes `generate` take given tokens, whatever their logits, so that two runs can be compared step by step."""

    def __init__(self, tokens: Sequence[int], prompt_length: int) -> None:
        self.tokens, self.prompt_length = tokens, prompt_length

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt_length]] = 0.0
        return forced


def find_sharing(model: PreTrainedModel, prompt: Sequence[int], padding: int, length: int) -> Sharing:
    """Which prompts may share a batch: those for which `prompt` is followed by the same logits in a batch, padded to
    `length`, as alone.

    What is not the common case is a notice. Raises Failure when the model cannot generate at all.
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
    # int8 rounds a text's activations together with those of its neighbours.
    smallest = (
        SMALLEST[torch.bfloat16]
        if getattr(model, "is_quantized", False)
        else SMALLEST.get(model.dtype, SMALLEST[torch.bfloat16])
    )
    limit = max(smallest, ROUNDING * difference(alone[:1], followed_logits(model, prompt, padding, length)))
    # Neighbours are other texts: one of the full length, and one of the length of the prompt.
    longer = [*prompt, *reversed(prompt)] * length
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


def effect(
    model: PreTrainedModel, alone: torch.Tensor, prompts: Sequence[Sequence[int]], padding: int, length: int
) -> float:
    """How far the logits after the first of `prompts` are from `alone`; infinite when the model cannot be run so."""
    try:
        return difference(alone, step_logits(model, prompts, padding, length))
    except UNFIT:
        return torch.inf


def difference(alone: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square of the difference, in standard deviations of `alone`, of the step where it is largest. Both:
    steps × vocabulary.
    """
    moved = (alone - other).square().mean(-1).sqrt() / alone.std(-1)
    # NaN, which a mask of padding alone can produce, is a difference.
    return float(moved.nan_to_num(torch.inf).max())


@torch.inference_mode()
def step_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], padding: int, length: int) -> torch.Tensor:
    """The logits of `STEPS` new tokens after the first of `prompts`, all padded on the left to `length`: steps ×
    vocabulary, in doubles.
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
    """The logits after `prompt` when padding follows it, which no causal model sees: they differ by rounding alone. 1 ×
    vocabulary, in doubles.
    """
    missing = length - len(prompt)
    ids = torch.tensor([list(prompt) + [padding] * missing], device=model.device)
    mask = torch.tensor([[1] * len(prompt) + [0] * missing], device=model.device)
    return model(input_ids=ids, attention_mask=mask).logits[:, len(prompt) - 1].double()
