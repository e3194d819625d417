"""A job for each cell of docs/matrix.md, on a small model and few rows; and its result, as the libraries load it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from prepared_workspace import save_encoder
from trainer.digits import captioned, save_model, write_digits
from trainer.small_sdxl import write_small_sdxl
from trainer.small_text_models import save_bert, save_t5
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    TrainerCallback,
)

from luthier_api.matrix import UNQUANTISED, Cell, spec_of
from luthier_api.methods import METHODS
from luthier_api.run import FineTuneRun
from luthier_api.tasks import TASKS
from trainer import tones

ROWS = 10
"""Of a job. Two steps and a rest of two rows are an epoch."""
STEPS = 4
VOCABULARY = 400
"""Tokens of the smallest model: more numbers than an evaluation may keep of a row."""
HEADS = ["classifier", "score", "qa_outputs", "pooler"]
"""Modules that a job with a head does not quantise, or does not use. Else transformers leaves the last layer alone."""
OPTIONS: Mapping[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "qlora": {"rank": 4},
    "adalora": {"rank": 2, "initialRank": 4, "initialFraction": 0.5},
    "prompt": {"virtualTokens": 4},
    "p-tuning": {"virtualTokens": 4, "encoderHiddenSize": 16},
    "prefix": {"virtualTokens": 4},
}
"""Method → its fields, for a small model."""
RATE, RATE_OF_ALL = 1e-2, 1e-3
"""Learning rates: of few weights, and of all."""


REWARDED: Mapping[str, Any] = {
    "training": {"maxLength": 48, "batchSize": 8, "microBatchSize": 4},
    "grpo": {
        "generations": 4,
        "maxCompletionLength": 8,
        "rewards": [{"type": "regex", "pattern": "[aeiou]{2}"}, {"type": "length", "tokens": 4}],
    },
}
"""Of grpo: completions that differ in what they are worth, without which nothing is learnt."""


@dataclass(frozen=True)
class Kind:
    """What is trained of a task."""

    model: Path
    rows: list[dict[str, Any]] | Path
    """Rows of a file, or the folder of images."""
    spec: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of the spec."""
    options: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """Method → further fields of it."""
    learns: bool = True
    """Whether a few steps are enough for less loss on the rows that they have seen."""
    load: Callable[[Kind, Path, Cell], Any] = field(default=lambda kind, result, cell: loaded(kind, result, cell))
    """(kind, folder of the result, cell) → the model as its library loads it."""
    inputs: Callable[[], dict[str, Any]] = field(default=lambda: tokens())
    """Inputs by which two models are compared."""


def job(root: Path, kind: Kind, cell: Cell, port: int = 29_500, processes: int = 1, **training: Any) -> FineTuneRun:
    """The run config of a cell on CPU. The rows of its files are those that it is measured on, in another order.

    `training`: fields that stand for others.
    """
    root.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {"files": [str(kind.rows)], "format": "imagefolder", "evalFraction": 0.2}
    if not isinstance(kind.rows, Path):
        lines = [json.dumps(row) + "\n" for row in kind.rows]
        for name, some in (("rows", lines), ("measured", lines[::-1])):
            (root / f"{name}.jsonl").write_text("".join(some))
        files = {"files": [str(root / "rows.jsonl")], "evalFiles": [str(root / "measured.jsonl")]}
    given = spec_of(cell)
    method = cell["method"]
    course = {"batchSize": 4, "microBatchSize": 2, "maxSteps": STEPS, "learningRate": RATE, "logSteps": 1}
    if method == "full":
        course["learningRate"] = RATE_OF_ALL
    spec = {
        **given,
        **kind.spec,
        "model": {"path": str(kind.model)} | given.get("model", {}),
        "dataset": files | kind.spec.get("dataset", {}),
        "method": given["method"] | OPTIONS.get(method, {}) | kind.options.get(method, {}),
        "training": course | kind.spec.get("training", {}) | given.get("training", {}) | training,
        "resources": {"gpusPerNode": 0, "processesPerNode": processes},
    }
    return FineTuneRun.model_validate(
        {"name": "cell", "workspace": str(root / "job"), "metricsPort": 0, "rendezvousPort": port, "spec": spec}
    )


class Changes(TrainerCallback):
    """Which weights a training has changed, and how much an evaluation has kept of a row."""

    loop: Any

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        gather, self.kept = self.loop.accelerator.gather_for_metrics, 0

        def noted(found: Any, *args: Any, **options: Any) -> Any:
            for tensor in found if isinstance(found, tuple | list) else [found]:
                self.kept = max(self.kept, tensor.numel() // max(len(tensor), 1))
            return gather(found, *args, **options)

        self.loop.gather_function = self.loop.accelerator.gather_for_metrics = noted
        self._before = {name: weight.detach().clone() for name, weight in self.loop.model.named_parameters()}
        self.learning = {name for name, weight in self.loop.model.named_parameters() if weight.requires_grad}
        self.changed = set[str]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        # After each step: AdaLoRA sets factors back to 0, as which they begin.
        for name, weight in self.loop.model.named_parameters():
            if name not in self.changed and not torch.equal(weight, self._before[name]):
                self.changed.add(name)


# ---- the result without Luthier


def quantisation(cell: Cell) -> BitsAndBytesConfig | None:
    """As our own pages say that the base of an adapter rests."""
    task = TASKS[cell["task"]]
    heads = HEADS if task.head or task.unused else None
    kind = METHODS[cell["method"]].quantization or cell["quantization"]  # type: ignore[index]  # a text
    if kind == UNQUANTISED:
        return None
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,  # as QLoRA is published
        llm_int8_skip_modules=heads,
    )


def loaded(kind: Kind, result: Path, cell: Cell) -> Any:
    """By transformers; and by PEFT, if it is an adapter."""
    auto = getattr(transformers, str(TASKS[cell["task"]].auto_class))
    if not (result / "adapter_config.json").exists():
        model, report = auto.from_pretrained(result, output_loading_info=True)
        unused = TASKS[cell["task"]].unused
        assert not [name for name in report["missing_keys"] if name.partition(".")[0] not in unused]
        assert not report["unexpected_keys"]
        return model
    config = AutoConfig.from_pretrained(result if (result / "config.json").exists() else kind.model)
    model = auto.from_pretrained(
        kind.model, config=config, ignore_mismatched_sizes=True, quantization_config=quantisation(cell)
    )
    for module in model.modules():
        # In an evaluation on some CPUs bitsandbytes would take another kernel, which rounds otherwise.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, result)


def drawn(kind: Kind, result: Path, cell: Cell) -> Any:
    """The UNet of diffusers with the file of the adapter."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(kind.model)
    pipeline.load_lora_weights(result)
    return pipeline.unet


def tokens() -> dict[str, Any]:
    ids = torch.tensor([[7, 30, 21, 14, 99, 45, 61], [5, 17, 80, 33, 42, 71, 12]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def source_and_target() -> dict[str, Any]:
    return tokens() | {"decoder_input_ids": torch.tensor([[0, 30, 21], [0, 80, 33]])}


def pixels() -> dict[str, Any]:
    return {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)}


def clips() -> dict[str, Any]:
    return {"input_values": torch.stack([torch.from_numpy(tones.tone(hertz)) for hertz in (300, 900)])}


def mel_and_text() -> dict[str, Any]:
    features = torch.linspace(-1, 1, 2 * 16 * 100).reshape(2, 16, 100)
    return {"input_features": features, "decoder_input_ids": torch.tensor([[257, 30, 21], [257, 80, 33]])}


def noisy_latents() -> dict[str, Any]:
    from trainer.small_sdxl import WIDTH

    return {
        "sample": torch.linspace(-1, 1, 4 * 16 * 16).reshape(1, 4, 16, 16),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.linspace(-1, 1, 77 * 2 * WIDTH).reshape(1, 77, 2 * WIDTH),
        "added_cond_kwargs": {"text_embeds": torch.linspace(-1, 1, WIDTH)[None], "time_ids": torch.full((1, 6), 32.0)},
    }


ANSWERS = ("logits", "start_logits", "end_logits", "last_hidden_state", "sample")


@torch.no_grad()
def answers(model: Any, kind: Kind) -> torch.Tensor:
    """What the model computes of the kind's inputs."""
    outputs = model.eval()(**kind.inputs())
    found = [outputs[name] for name in ANSWERS if name in outputs]
    whole = [each if isinstance(each, torch.Tensor) else each.tensor("the comparison") for each in found]
    return torch.cat([each.float().flatten() for each in whole])


# ---- models and rows


def kinds(root: Path, llama: Path, paragraphs: list[str]) -> dict[str, Kind]:
    """Task → what is trained of it. The models are written into `root`."""
    texts = [" ".join(text.split()[:12]) for text in paragraphs if len(text.split()) > 12]
    some = texts[:ROWS]
    torch.manual_seed(1)
    bert, t5 = save_bert(root / "bert", texts[:400]), save_t5(root / "t5", texts[:400])
    decoder = with_biases(llama, root / "llama")
    rated = AutoModelForSequenceClassification.from_pretrained(decoder, num_labels=1)
    rated.save_pretrained(root / "rated")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    tokenizer.save_pretrained(root / "rated")
    classifier = save_encoder(root / "encoder", tokenizer)
    pictures = write_digits(root / "digits", digits=(0, 1), each=ROWS // 2)
    short = {"training": {"maxLength": 48}}
    pairs = [{"prompt": text[:20], "chosen": text[20:], "rejected": text[20:][::-1]} for text in some]
    return {
        "causal-lm": Kind(decoder, [{"text": text} for text in texts[: 3 * ROWS]], short),
        "seq2seq": Kind(
            t5,
            [{"source": text, "target": text[:20]} for text in some],
            short | {"seq2seq": {"maxTargetLength": 8}},
            inputs=source_and_target,
        ),
        "preference": Kind(decoder, pairs, short),
        "text-classification": Kind(classifier, [{"text": text, "label": "ab"["the" in text]} for text in some], short),
        "token-classification": Kind(bert, [tagged(text) for text in some], short),
        "question-answering": Kind(bert, [asked(text) for text in some], short | {"answering": {"stride": 8}}),
        "masked-lm": Kind(bert, [{"text": text} for text in some], short),
        "embedding": Kind(bert, [{"anchor": text[:20], "positive": text[20:]} for text in some], short),
        "reward": Kind(root / "rated", pairs, {"training": {"maxLength": 96}}),
        "grpo": Kind(
            decoder,
            [{"prompt": text[:20]} for text in some],
            REWARDED,
            learns=False,
        ),
        "image-classification": Kind(
            save_model(root / "vit"),
            pictures,
            options={"ia3": {"targetModules": ["all-linear"]}},  # PEFT has no usual modules of ViT
            inputs=pixels,
        ),
        "audio-classification": Kind(
            tones.save_model(root / "wav2vec2"),
            heard(root / "tones"),
            options={"ia3": {"targetModules": ["all-linear"]}},  # PEFT has no usual modules of wav2vec2
            inputs=clips,
        ),
        "speech-recognition": Kind(
            tones.save_speech_model(root / "whisper"),
            [{"audio": row["audio"], "text": f"a {row['label']} tone"} for row in heard(root / "speech")],
            {"speech": {"language": "en", "beams": 0}, "training": {"maxLength": 32}},
            options={"ia3": {"targetModules": ["all-linear"]}},  # PEFT has no usual modules of Whisper
            inputs=mel_and_text,
        ),
        "text-to-image": Kind(
            write_small_sdxl(root / "sdxl"),
            captioned(root / "captioned", pictures),
            {"image": {"resolution": 32}},
            load=drawn,
            inputs=noisy_latents,
        ),
    }


def heard(folder: Path) -> list[dict[str, Any]]:
    """Clips of two classes, by their paths."""
    table = tones.write_tones(folder, each=ROWS // 2, classes=("low", "high"))
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    return [row | {"audio": str(folder / row["audio"])} for row in rows]


def with_biases(llama: Path, folder: Path) -> Path:
    """A Llama with biases, for what trains them."""
    config = AutoConfig.from_pretrained(llama)
    config.attention_bias = config.mlp_bias = True
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


def tagged(text: str) -> dict[str, Any]:
    words = text.split()
    return {"words": words, "tags": ["B-NAME" if word[0].isupper() else "O" for word in words]}


def asked(text: str) -> dict[str, Any]:
    words = text.split()
    begin = len(" ".join(words[:2])) + 1
    return {
        "question": f"what follows {words[1]}?",
        "context": text,
        "answers": {"text": [words[2]], "answer_start": [begin]},
    }
