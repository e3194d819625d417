"""text-generation: a causal language model, with LoRA adapters merged into it, over batches of prompts.

A text depends only on its prompt, its settings, its seed and the batch size: all steps of a model have one number of
texts, and the other lengths of a kernel's input depend only on the text itself. `slots` has the fast way, for models
whose only memory is attention; the others are padded to lengths that follow from the prompt, or not at all.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from luthier_api.exitcodes import ExitCode
from luthier_api.generate import GenerateJobSpec
from luthier_api.run import GenerateRun, PreparedRecord
from luthier_api.task_settings import TextSettings
from luthier_api.tasks import REFERENCE
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data.masks import ChatReader
from luthier_trainer.generation.batching import find_sharing
from luthier_trainer.generation.constraints import Constrained, Constraints
from luthier_trainer.generation.engines.base import batches
from luthier_trainer.generation.hardware import Hardware
from luthier_trainer.generation.offloading import offload_layers
from luthier_trainer.generation.records import TextRecords, line_keys
from luthier_trainer.generation.samples import Output, Sample, padded
from luthier_trainer.generation.sampling import PENALTIES, Choice, Chosen, Ended, Heartbeat, chain_of
from luthier_trainer.generation.slots import Slots, capacity_for
from luthier_trainer.generation.texts import Text
from luthier_trainer.methods import quantization
from luthier_trainer.models.inspect import max_positions
from luthier_trainer.models.merge import add_adapters
from luthier_trainer.models.quantised_base import check_rows
from luthier_trainer.models.sources import OWN_WEIGHTS
from luthier_trainer.runtime.failure import Failure

SHORTEST_BATCH = 32  # tokens; shorter prompts are padded to it, longer ones to the next power of two
TEST_TEXT = "The quick brown fox jumps over the lazy dog"
TEST_TOKENS = 8  # at most, of the test text
KNOWN_PROMPTS = 4096  # whose tokens are kept: a window of prompts is looked at several times


class TextEngine:
    """Makes texts, `batch_size` at a time, with the model in `model_path` and the adapters of the spec."""

    window_rows: ClassVar[int] = KNOWN_PROMPTS
    records = TextRecords(keys=line_keys("prompt", REFERENCE, "text", "finishReason", "promptTokens", "newTokens"))

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
        model = load_model(
            model_path,
            torch.float32 if adapters else hardware.dtype,
            self.device,
            spec.model.quantization and quantization.settings_for(spec.model.quantization.type, hardware.dtype),
        )
        if self.device.type == "cpu":
            check_rows(model, "spec.model", "Use a GPU, or a model that is not quantised")
        if adapters and is_quantised(model):
            model = model.dequantize(torch.float32).float()
        model = add_adapters(model, adapters, [adapter.weight for adapter in spec.adapters], "spec.adapters")
        self.model = model.eval() if is_quantised(model) else place(model, spec.text, self.device, hardware.dtype)
        self.context = max_positions(model.config)
        ends = end_tokens(model.generation_config.eos_token_id, self.tokenizer.eos_token_id)
        if self.settings.chat:
            ends |= ChatReader(self.tokenizer, "assistant").turn_ends()
        self.ends = frozenset(ends)
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
        self.slots = None
        if self.sharing in ("slots", "slots apart"):
            self.slots = Slots(self.model, batch_size, self.padding, apart=self.sharing == "slots apart")
        self.choice = Choice()
        self.constraints = Constraints(self.tokenizer)
        self.tokens_of = lru_cache(KNOWN_PROMPTS)(self._tokenize)

    def tokens(self, sample: Sample) -> list[int]:
        """Return the token ids of a sample's prompt."""
        return list(self.tokens_of(sample.prompt))

    def _tokenize(self, prompt: str) -> tuple[int, ...]:
        # A chat template has written the tokens that begin a text.
        return tuple(self.tokenizer(prompt, add_special_tokens=not self.settings.chat)["input_ids"])

    def settings_of(self, sample: Sample) -> TextSettings:
        """Return the settings of a sample."""
        assert isinstance(sample.settings, TextSettings)
        return sample.settings

    def expect(self, samples: Sequence[Sample]) -> None:
        """Do nothing: the tokens of a prompt are kept once they were asked for."""

    def problem(self, sample: Sample) -> str | None:
        """Return why this sample can never be made; None if it can."""
        length, new = len(self.tokens(sample)), self.settings_of(sample).max_new_tokens
        if length == 0:
            return "prompt: the tokenizer makes no token of it; write a prompt"
        if self.context is not None and length + new > self.context:
            return (
                f"prompt: {length} tokens and text.maxNewTokens {new} are more than the model's {self.context}; shorten"
                " the prompt or lower text.maxNewTokens"
            )
        try:
            self.constraints.matcher(self.settings_of(sample))
        except ValueError as error:
            return str(error)
        return None

    def group(self, sample: Sample) -> Hashable:
        """Return what samples that are worked on together have in common.

        In slots it is the capacity of the caches, unless each text has its own. In batches it is the length in tokens
        that a prompt is padded to: the next power of two, limited by the context of the model, or the prompt's own
        length without padding.
        """
        length, new = len(self.tokens(sample)), self.settings_of(sample).max_new_tokens
        if self.slots:
            return 0 if self.slots.apart else capacity_for(length + new, self.context)
        if self.sharing != "any length":
            return length
        rounded = max(SHORTEST_BATCH, 1 << (length - 1).bit_length())
        return rounded if self.context is None else max(length, min(rounded, self.context - new))

    def work(self, samples: Sequence[Sample]) -> Iterator[list[Output]]:
        """Yield the outputs of all samples, as they are finished."""
        searched = [sample for sample in samples if self.settings_of(sample).num_beams > 1]
        for sample in searched:
            yield [self.search(sample)]
        samples = [sample for sample in samples if self.settings_of(sample).num_beams == 1]
        if self.slots is None:
            size = 1 if self.sharing == "none" else self.batch_size
            for batch in batches(samples, self.group, size):
                yield self.make_batch(batch, size)
            return
        for members in batches(samples, self.group, len(samples)):
            texts = [self.text(sample) for sample in members]
            capacity = self.group(members[0])
            assert isinstance(capacity, int)
            for ended in self.slots.write(texts, capacity, self.choice):
                yield [self.output(text) for text in ended]

    def text(self, sample: Sample) -> Text:
        """Return the text of a sample, before its first token."""
        settings = self.settings_of(sample)
        text = Text(self.tokens(sample), settings, sample.seed or 0, self.ends, self.tokenizer, work=sample)
        text.penalties = chain_of(PENALTIES, settings, text)
        if (matcher := self.constraints.matcher(settings)) is not None:
            text.penalties.append(Constrained(text, matcher))
        return text

    @torch.inference_mode()
    def make_batch(self, samples: Sequence[Sample], size: int) -> list[Output]:
        """Return the outputs of samples of one group, computed as a batch of `size` rows."""
        texts = [self.text(sample) for sample in padded(samples, size)]
        length = self.group(samples[0])
        assert isinstance(length, int)
        gaps = [length - len(text.prompt) for text in texts]
        rows = list(zip(gaps, texts, strict=True))
        self.model.generate(
            input_ids=torch.tensor([[self.padding] * gap + text.prompt for gap, text in rows], device=self.device),
            attention_mask=torch.tensor([[0] * gap + [1] * len(text.prompt) for gap, text in rows], device=self.device),
            logits_processor=[Chosen(texts, self.choice, self.padding)],
            stopping_criteria=[Ended(texts)],
            max_new_tokens=max(text.settings.max_new_tokens for text in texts),
        )
        return [self.output(text) for text in texts[: len(samples)]]

    @torch.inference_mode()
    def search(self, sample: Sample) -> Output:
        """Return the output of a sample with beam search: transformers' own, over this prompt alone."""
        text, settings = self.text(sample), self.settings_of(sample)
        made = self.model.generate(
            input_ids=torch.tensor([text.prompt], device=self.device),
            attention_mask=torch.ones(1, len(text.prompt), dtype=torch.long, device=self.device),
            logits_processor=[Heartbeat()],
            num_beams=settings.num_beams,
            length_penalty=settings.length_penalty,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens or None,
            repetition_penalty=settings.repetition_penalty,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
        )
        for token in made[0, len(text.prompt) :].tolist():
            if not text.ended:
                text.take(token)
        return self.output(text)

    def output(self, text: Text) -> Output:
        """Return the output of a text that has ended."""
        facts = {"finishReason": text.finish, "promptTokens": len(text.prompt), "newTokens": len(text.new)}
        return Output(text.work, facts, text=text.text())


def place(model: PreTrainedModel, settings: TextSettings, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model for evaluation, in `dtype`, on the device as far as `text.offload` puts it there."""
    model = model.to(dtype).eval()
    return offload_layers(model, device) if settings.offload == "layers" else model.to(device)


def load_model(
    path: Path, dtype: torch.dtype, device: torch.device, quantised: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """Load the causal language model in `path`. Code in the folder is never executed.

    `quantised`: how its linear layers are quantised while it is loaded. Weights in types of bitsandbytes keep their
    type and are loaded on `device`. Weights in FP8 are converted to `dtype`, on all models of GPUs. Raises Failure if
    the folder holds no causal language model, or not all of its weights.
    """
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        quantisation = getattr(config, "quantization_config", None) or {}
        if quantisation.get("quant_method") == "fp8":
            # On GPUs with FP8, weights would otherwise stay in it, and a later conversion of their dtype would ignore
            # their scales.
            config.quantization_config = quantisation | {"dequantize": True}
        placed: dict[str, Any] = {}
        if quantised or quantisation.get("quant_method") == "bitsandbytes":
            placed["device_map"] = {"": device}
        if quantised:
            placed["quantization_config"] = quantised
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
