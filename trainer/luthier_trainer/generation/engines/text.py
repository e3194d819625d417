"""text-generation: a causal language model, with LoRA adapters merged into it, over batches of prompts.

A text depends only on its prompt, its seed and the batch size. All batches have one size, and the length that a prompt
is padded to depends only on the prompt, so that kernels get the same shapes whatever else is in the batch. Models that
do not support padding get none.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data.masks import ChatReader
from luthier_trainer.generation.batching import find_sharing
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.records import TextRecords
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.generation.sampling import processors
from luthier_trainer.models.inspect import max_positions
from luthier_trainer.models.merge import add_adapters
from luthier_trainer.models.quantised_base import check_rows
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.runtime.failure import Failure

SHORTEST_BATCH = 32  # tokens; shorter prompts are padded to it, longer ones to the next power of two
TEST_TEXT = "The quick brown fox jumps over the lazy dog"
TEST_TOKENS = 8  # at most, of the test text


class TextEngine:
    """Makes texts, `batch_size` at a time, with the model in `model_path` and the adapters of the spec."""

    records = TextRecords(
        keys=(
            "row",
            "sample",
            "prompt",
            "seed",
            "input",
            "text",
            "error",
            "finishReason",
            "promptTokens",
            "newTokens",
            "sha256",
            "settings",
            "environment",
        )
    )

    @classmethod
    def load(cls, run: GenerateRun, prepared: PreparedRecord, hardware: Hardware, batch_size: int) -> TextEngine:
        """Return the engine with its model on the device. Raises Failure if it or an adapter cannot be loaded."""
        model = Path(prepared.model_path)
        tokenizer = WorkspaceFolder(Path(run.workspace)).prepared / "tokenizer"
        adapters = [Path(path) for path in prepared.adapter_paths]
        return cls(run.spec, model, tokenizer if tokenizer.exists() else model, adapters, hardware, batch_size)

    def __init__(
        self,
        spec: GenerateJobSpec,
        model_path: Path,
        tokenizer_path: Path,
        adapters: Sequence[Path],
        hardware: Hardware,
        batch_size: int,
    ) -> None:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.settings, self.batch_size, self.device = spec.text, batch_size, torch.device(hardware.device)
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True)
        # Adapters are merged in fp32, and the result is rounded once. In bf16, each adapter would add a rounding error.
        model = load_model(model_path, torch.float32 if adapters else hardware.dtype, self.device)
        if self.device.type == "cpu":
            check_rows(model, "spec.model", "Use a GPU, or a model that is not quantised")
        if adapters and is_quantised(model):
            model = model.dequantize(torch.float32).float()
        model = add_adapters(model, adapters, [adapter.weight for adapter in spec.adapters], "spec.adapters")
        self.model = (model if is_quantised(model) else model.to(self.device, hardware.dtype)).eval()
        self.context = max_positions(model.config)
        self.ends = end_tokens(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        if self.settings.chat:
            self.ends |= ChatReader(self.tokenizer, "assistant").turn_ends()
        self.padding = next((t for t in (self.tokenizer.pad_token_id, *sorted(self.ends)) if t is not None), 0)
        # Replaced, so that sampling settings of the model's repository do not mix with those of the job.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=spec.text.max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.padding,
        )
        length = SHORTEST_BATCH if self.context is None else min(SHORTEST_BATCH, self.context - TEST_TOKENS)
        prompt = [
            token
            for token in self.tokenizer(TEST_TEXT)["input_ids"]
            if token != self.padding and token not in self.ends
        ]
        self.sharing = find_sharing(self.model, prompt[:TEST_TOKENS], self.padding, length)

    def tokens(self, sample: Sample) -> list[int]:
        """Return the token ids of a sample's prompt."""
        # A chat template has written the tokens that begin a text.
        return list(self.tokenizer(sample.prompt, add_special_tokens=not self.settings.chat)["input_ids"])

    def problem(self, sample: Sample) -> str | None:
        """Return why this sample can never be made; None if it can."""
        length, new = len(self.tokens(sample)), self.settings.max_new_tokens
        if length == 0:
            return "prompt: the tokenizer makes no token of it; write a prompt"
        if self.context is not None and length + new > self.context:
            return (
                f"prompt: {length} tokens and text.maxNewTokens {new} are more than the model's {self.context}; shorten"
                " the prompt or lower text.maxNewTokens"
            )
        return None

    def group(self, sample: Sample) -> Hashable:
        """Return the length in tokens that a sample's prompt is padded to.

        It is the next power of two, limited by the context of the model, or the prompt's own length without padding.
        """
        length = len(self.tokens(sample))
        if self.sharing != "any length":
            return length
        rounded = max(SHORTEST_BATCH, 1 << (length - 1).bit_length())
        return (
            rounded if self.context is None else max(length, min(rounded, self.context - self.settings.max_new_tokens))
        )

    def make(self, samples: Sequence[Sample]) -> list[Output]:
        """Return the outputs of samples of one group, in the same order."""
        if self.sharing == "none":
            return [output for sample in samples for output in self.make_batch([sample], 1)]
        return self.make_batch(samples, self.batch_size)

    @torch.inference_mode()
    def make_batch(self, samples: Sequence[Sample], size: int) -> list[Output]:
        """Return the outputs of samples of one group, computed as a batch of `size` rows."""
        batch = padded(samples, size)
        prompts = [self.tokens(s) for s in batch]
        length = self.group(samples[0])
        assert isinstance(length, int)
        ids = torch.tensor([[self.padding] * (length - len(p)) + p for p in prompts], device=self.device)
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        chain = processors(self.settings, [s.seed for s in batch], mask)
        written = self.model.generate(input_ids=ids, attention_mask=mask, logits_processor=chain)[:, length:].tolist()
        return [self.output(s, prompt, new) for s, prompt, new in zip(samples, prompts, written, strict=False)]

    def output(self, sample: Sample, prompt: list[int], new: list[int]) -> Output:
        """Return the output with the text up to the first end token. All tokens after it are padding."""
        end = next((i for i, token in enumerate(new) if token in self.ends), None)
        facts = {
            "finishReason": "length" if end is None else "stop",
            "promptTokens": len(prompt),
            "newTokens": len(new) if end is None else end,
        }
        return Output(sample, facts, text=continuation(self.tokenizer, prompt, new[:end]))


def continuation(tokenizer: PreTrainedTokenizerBase, prompt: list[int], new: list[int]) -> str:
    """Return exactly the text that the tokens `new` add to the text of `prompt`.

    Both are decoded together, and the text of the prompt is cut off. If the new tokens were decoded alone,
    SentencePiece tokenizers would drop a leading blank, and a character whose bytes begin in the prompt would be lost.
    Blanks before punctuation stay as the model wrote them.
    """
    before, whole = (
        tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for tokens in (prompt, prompt + new)
    )
    shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
    return whole[shared:]


def load_model(path: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the causal language model in `path`. Code in the folder is never executed.

    Weights in types of bitsandbytes keep their type and are loaded on `device`. Weights in FP8 are converted to
    `dtype`, on all models of GPUs. Raises Failure if the folder holds no causal language model, or not all of its
    weights.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        quantisation = getattr(config, "quantization_config", None) or {}
        if quantisation.get("quant_method") == "fp8":
            # On GPUs with FP8, weights would otherwise stay in it, and a later conversion of their dtype would ignore
            # their scales.
            config.quantization_config = quantisation | {"dequantize": True}
        placed = {"device_map": {"": device}} if quantisation.get("quant_method") == "bitsandbytes" else {}
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **placed,
            **OWN_WEIGHTS,
        )
    except (ValueError, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        raise Failure(
            ExitCode.INVALID_SPEC, f"spec.model: no causal language model can be loaded from {path}: {error}"
        ) from None
    # transformers initialises missing weights with random numbers, and the model would still generate text.
    if missing := sorted(report["missing_keys"]):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"spec.model: {path} holds no weights for {', '.join(missing[:3])}{' and others' * (len(missing) > 3)} of a"
            f" {type(model).__name__}; choose a model that was trained for text generation",
        )
    return model


def is_quantised(model: PreTrainedModel) -> bool:
    """Return whether the weights are quantised, so that `to` cannot convert their dtype."""
    return bool(getattr(model, "is_quantized", False))


def end_tokens(*ids: int | list[int] | None) -> set[int]:
    """Return the ids of all tokens that end a text, from the model's generation settings and from its tokenizer."""
    return {token for i in ids if i is not None for token in (i if isinstance(i, list) else [i])}
