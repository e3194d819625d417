"""The planned peak of a GPU against what torch has allocated after real steps, through the trainer's own parts.

Models have random weights. Planned is what `prepare` plans, without CUDA's context and fragments, which torch does not
count.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.status import ResolvedSource
from luthier_trainer.methods import apply as methods
from luthier_trainer.methods.trainable import weights_of
from luthier_trainer.prepare.memory import memory_facts
from luthier_trainer.tasks.base import Model, TrainingContext
from luthier_trainer.tasks.table import task_of
from luthier_trainer.training.arguments import training_arguments
from luthier_trainer.workspace import gpu_memory
from luthier_trainer.workspace.plan import plan_training

ERROR = 0.15
STEPS = 3
CONFIGS: dict[str, dict[str, Any]] = {
    # Of Qwen2.5-0.5B, half as deep: a vocabulary that is large for its width.
    "qwen2": {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 12,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    # Of Llama 3.2 1B, with Llama 2's vocabulary.
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "gpt2": {"vocab_size": 50_257, "n_embd": 1024, "n_layer": 12, "n_head": 16, "n_positions": 1024},
    "mixtral": {
        "vocab_size": 32_000,
        "hidden_size": 1024,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
}


@dataclass(frozen=True)
class Case:
    kind: str
    method: str
    recomputed: bool
    rows: int
    tokens: int
    accumulation: int = 1
    padded: bool = False
    packed: bool = False
    training: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Of the method."""

    @property
    def name(self) -> str:
        words = [self.kind, self.method, f"{self.rows}x{self.tokens}", *self.training.values(), *self.options]
        words += [word for word in ("recomputed", "padded", "packed") if getattr(self, word)]
        return " ".join(map(str, words))


CASES = [
    Case("llama", "lora", recomputed=True, rows=2, tokens=4096),
    Case("llama", "qlora", recomputed=True, rows=4, tokens=2048),
    Case("llama", "qlora", recomputed=False, rows=2, tokens=1024),
    Case("llama", "full", recomputed=True, rows=2, tokens=2048),
    Case("qwen2", "lora", recomputed=False, rows=2, tokens=1024),
    Case("qwen2", "lora", recomputed=True, rows=4, tokens=2048),
    Case("qwen2", "lora", recomputed=False, rows=4, tokens=512, padded=True),
    Case("qwen2", "lora", recomputed=True, rows=2, tokens=4096, packed=True),
    Case("qwen2", "lora", recomputed=False, rows=2, tokens=1024, options={"dropout": 0.1}),
    Case("qwen2", "full", recomputed=False, rows=1, tokens=512, accumulation=2),
    Case("qwen2", "full", recomputed=True, rows=1, tokens=512),
    Case("qwen2", "full", recomputed=True, rows=2, tokens=512, training={"optimizer": "adamw_8bit"}),
    Case("gpt2", "full", recomputed=False, rows=4, tokens=512),
    Case("mixtral", "lora", recomputed=False, rows=2, tokens=1024, options={"targetModules": ["q_proj", "v_proj"]}),
    Case("llama", "lora", recomputed=False, rows=2, tokens=1024, training={"precision": "fp32"}),
]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a model with random weights in bf16, which is made when it is first asked for."""

    @cache
    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        config = transformers.CONFIG_MAPPING[kind](**CONFIGS[kind])
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="100GB")
        return folder

    return make


def spec_of(case: Case, gpus: int = 1) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "task": "causal-lm",
            "model": {"id": "org/model"},
            "dataset": {"id": "org/texts"},
            "method": {"type": case.method, **case.options},
            "training": {
                "batchSize": case.rows * case.accumulation,
                "microBatchSize": case.rows,
                "maxSteps": STEPS,
                "maxLength": case.tokens,
                "gradientCheckpointing": case.recomputed,
                "precision": "bf16",
                "packing": "isolated" if case.packed else "none",
                **case.training,
            },
            "resources": {"gpusPerNode": gpus},
        }
    )


def rows_of(case: Case, vocabulary: int) -> Dataset:
    """Return random tokens; the first row of each micro-batch is shorter where rows are padded."""
    count = STEPS * case.rows * case.accumulation
    lengths = [case.tokens // 2 if case.padded and row % case.rows == 0 else case.tokens for row in range(count)]
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
    columns: dict[str, Any] = {"input_ids": ids, "length": lengths}
    if case.packed:
        part = case.tokens // 8
        columns["seq_lengths"] = [[part, 3 * part, 4 * part] for _ in range(count)]
    return Dataset.from_dict(columns)


def run(case: Case, folder: Path, checkpoints: Path, gpus: int = 1) -> tuple[Any, int]:
    """Return (what `prepare` plans, bytes that torch has allocated at the peak)."""
    spec = spec_of(case, gpus)
    task = task_of(spec)
    config = transformers.AutoConfig.from_pretrained(folder)
    rows = rows_of(case, config.vocab_size)
    processor: Any = SimpleNamespace(pad_token_id=0)
    plan = plan_training(spec, len(rows), None)
    weights = weights_of(config, spec, plan, folder)
    given = Model(ResolvedSource(source="random"), folder, config, processor)
    facts = memory_facts(task, given, spec, plan, weights, None, rows)
    assert facts.missing is None or not gpus
    planned = gpu_memory.peak(spec, plan, facts)

    gc.collect()
    arguments = training_arguments(task, spec, plan, checkpoints, evaluates=False, step_timeout=600)
    arguments.save_strategy = transformers.trainer_utils.SaveStrategy.NO
    before = torch.cuda.memory_allocated() if gpus else 0
    precision = case.training.get("precision", "bf16")
    stored = methods.weights_options(spec.method, precision, False, arguments.device, spec.model.quantization)
    context = TrainingContext(spec, folder, processor, weights=stored)
    loaded = task.load_model(context)
    model = methods.with_method(loaded.model, spec.method, "CAUSAL_LM", loaded.new_modules, deepspeed=False)
    setup = task.trainer(context, loaded.model)
    trainer = setup.trainer(
        model=model, args=arguments, data_collator=setup.collator, train_dataset=rows, **setup.options
    )
    if gpus:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    return planned, (torch.cuda.max_memory_allocated() - before) if gpus else 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_planned_peak_is_what_torch_allocates(
    case: Case, folder_of: Callable[[str], Path], tmp_path: Path, figure: Callable[..., None]
) -> None:
    planned, measured = run(case, folder_of(case.kind), tmp_path)
    expected = gpu_memory.tensors(planned)
    error = expected / measured - 1
    outside = torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved()
    figure(
        case=case.name,
        planned_mib=expected >> 20,
        measured_mib=measured >> 20,
        error_percent=round(100 * error, 2),
        reserved_mib=torch.cuda.max_memory_reserved() >> 20,
        context_mib=outside >> 20,
        terms_mib={name: size >> 20 for name, size in planned.gpu.items()},
    )
    assert abs(error) <= ERROR
