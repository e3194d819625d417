"""Draws the tables of memory.md from the planner, so that the two cannot disagree: `python docs/memory_tables.py`
(`--check` only compares).

Unlike the tables of `render.py` they need torch: a step of each model is computed on the meta device, from a
configuration that is written here by hand. A table stands between `<!-- memory: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from render import table

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import MemoryFacts
from luthier_api.status import Plan, ResolvedSource
from luthier_trainer.methods.trainable import weights_in
from luthier_trainer.models.memory import Trial
from luthier_trainer.prepare.memory import facts_of_trial
from luthier_trainer.tasks.base import Model
from luthier_trainer.tasks.table import task_of
from luthier_trainer.workspace import gpu_memory

PAGE = Path(__file__).resolve().parent / "memory.md"
BLOCK = re.compile(r"(<!-- memory: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
GIB = 1 << 30

T5_V1_1 = {"d_kv": 64, "num_layers": 24, "feed_forward_proj": "gated-gelu"}
QWEN_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
}


def spec_of(method: dict[str, Any], **training: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "task": "causal-lm",
            "model": {"id": "org/model"},
            "dataset": {"id": "org/texts"},
            "method": method,
            "training": {"batchSize": 8, **training},
            "resources": {"gpusPerNode": 1},
        }
    )


def skeleton(kind: str, auto: str, settings: dict[str, Any]) -> Any:
    """Return a model of transformers on the meta device."""
    config = transformers.CONFIG_MAPPING[kind](**settings)
    if auto == "Seq2SeqLM":
        config.decoder_start_token_id = 0
    with torch.device("meta"):
        model = getattr(transformers, f"AutoModelFor{auto}").from_config(config, attn_implementation="eager")
        if auto == "Seq2SeqLM":
            # transformers 5.23 ties the output layer of all T5; those of version 1.1 have one of their own.
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
    return model


def facts(model: Any, spec: FineTuneJobSpec, plan: Plan, tokens: int, answer: int = 0) -> MemoryFacts:
    """Return the facts of a step over rows of `tokens`; labels of an encoder-decoder have `answer` tokens."""

    def batch(rows: int) -> dict[str, Any]:
        with torch.device("meta"):
            ids = torch.empty((rows, tokens), dtype=torch.int64)
            return {"input_ids": ids, "labels": torch.empty((rows, answer or tokens), dtype=torch.int64)}

    weights = weights_in(model, [], spec, plan, "bfloat16")
    return facts_of_trial(Trial(model, batch, None, [], tokens), spec, plan, weights)


# ---- one plan, term by term

TERMS = {
    "weights": "linear layers in NF4 with double quantisation (0.516 bytes a weight), embedding and head in bf16,"
    " adapters in fp32",
    "optimizer": "Adam's two moments of the adapters in fp32",
    "gradients": "gradients of the adapters in fp32, as far as they are there at the peak",
    "activations": "what the highest moment of the forward and backward pass holds: here the inputs of all layers, and"
    " the logits of some tokens with their gradients, or one layer that is computed again",
    "unpacked layer": "the largest linear layer in bf16, while it is multiplied",
    "workspace": "cuBLAS, in each of two threads",
    "context": "CUDA's context and libraries, which torch does not count",
    "fragments": "15 % of the activations, which torch allocates anew in each step",
}


@cache
def qlora() -> tuple[FineTuneJobSpec, MemoryFacts]:
    """Return QLoRA of Qwen2.5-7B over rows of 2,048 tokens, whose activations are recomputed."""
    spec = spec_of({"type": "qlora"}, gradientCheckpointing=True, maxLength=2048, precision="bf16")
    config = transformers.Qwen2Config(**QWEN_7B)
    model = Model(ResolvedSource(source="Qwen/Qwen2.5-7B"), PAGE.parent, config, SimpleNamespace(pad_token_id=0))
    trial = task_of(spec).trial(model, spec, None, None)
    assert not isinstance(trial, str)
    weights = weights_in(trial.model, [], spec, layout(1), "bfloat16")
    return spec, facts_of_trial(trial, spec, layout(1), weights)


def layout(rows: int) -> Plan:
    return Plan(
        strategy="none", micro_batch_size=rows, accumulation_steps=1, precision="bf16", gradient_checkpointing=True
    )


def terms() -> str:
    spec, given = qlora()
    memory = gpu_memory.peak(spec, layout(1), given)

    def rows() -> Iterator[Sequence[object]]:
        for name, size in memory.gpu.items():
            yield name, f"{size / GIB:.2f}", TERMS[name]
        yield "**together**", f"**{memory.gpu_bytes / GIB:.2f}**", ""

    return table(("term", "GiB", "is"), rows())


def batches() -> str:
    spec, given = qlora()

    def rows() -> Iterator[Sequence[object]]:
        for size in (1, 2, 4, 8, 16):
            memory = gpu_memory.peak(spec, layout(size), given)
            yield size, f"{memory.gpu['activations'] / GIB:.1f}", f"{memory.gpu_bytes / GIB:.1f}"

    return table(("microBatchSize", "activations, GiB", "together, GiB"), rows())


# ---- PEFT's README


@dataclass(frozen=True)
class Published:
    """A row of the table in PEFT's README: one A100 with 80 GB, fp32, 8 rows of 64 tokens, LoRA of rank 8."""

    model: str
    kind: str
    auto: str
    config: dict[str, Any]
    targets: list[str]
    full: float | None
    """GB of the GPU; None: out of memory."""
    lora: float
    offloaded: float
    answer: int = 0


PEFT_README = [
    Published(
        model="T0_3B",
        kind="t5",
        auto="Seq2SeqLM",
        config=T5_V1_1 | {"vocab_size": 32_128, "d_model": 2048, "d_ff": 5120, "num_heads": 32},
        targets=["q", "v"],
        answer=5,
        full=47.14,
        lora=14.4,
        offloaded=9.8,
    ),
    Published(
        model="mt0-xxl",
        kind="mt5",
        auto="Seq2SeqLM",
        config=T5_V1_1 | {"vocab_size": 250_112, "d_model": 4096, "d_ff": 10_240, "num_heads": 64},
        targets=["q", "v"],
        answer=5,
        full=None,
        lora=56,
        offloaded=22,
    ),
    Published(
        model="bloomz-7b1",
        kind="bloom",
        auto="CausalLM",
        config={"vocab_size": 250_880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
        targets=["query_key_value"],
        full=None,
        lora=32,
        offloaded=18.1,
    ),
]
A100 = 80 * GIB
DEFAULT_BUCKET = 500_000_000  # DeepSpeed's own size of a bucket, which PEFT's example leaves as it is
FULL: dict[str, Any] = {"type": "full"}


@dataclass(frozen=True)
class Cell:
    model: str
    trained: str
    published: float | None
    """GB of the GPU; None: out of memory."""
    planned: int
    """Bytes of tensors."""


@cache
def all_cells() -> list[Cell]:
    return [cell for row in PEFT_README for cell in cells(row)]


def cells(row: Published) -> Iterator[Cell]:
    """Yield the cells of a row.

    Gradients count from the beginning of a step, as with accumulation: torch 1.13 kept them between steps.
    """
    lora = {"type": "lora", "rank": 8, "alpha": 32, "dropout": 0.1, "targetModules": row.targets}
    plan = Plan(strategy="none", micro_batch_size=8, accumulation_steps=2, precision="fp32")
    spec, whole = (spec_of(m, gradientCheckpointing=False, precision="fp32", maxLength=64) for m in (lora, FULL))

    def planned(spec: FineTuneJobSpec, given: MemoryFacts, strategy: str) -> int:
        layout = plan.model_copy(update={"strategy": strategy})
        size = gpu_memory.tensors(gpu_memory.peak(spec, layout, given))
        if strategy != "none":
            size += DEFAULT_BUCKET * given.computed_bytes - gpu_memory.communication(layout, given)
        return size

    model = skeleton(row.kind, row.auto, row.config)
    if row.full is None:  # weights and their states alone do not fit
        given = gpu_memory.without_model(whole, weights_in(model, [], whole, plan, "float32"), "not computed")
    else:
        given = facts(model, whole, plan, 64, row.answer)
    yield Cell(row.model, "full", row.full, planned(whole, given, "none"))
    given = facts(skeleton(row.kind, row.auto, row.config), spec, plan, 64, row.answer)
    yield Cell(row.model, "LoRA", row.lora, planned(spec, given, "none"))
    yield Cell(row.model, "LoRA, ZeRO-3 with offload", row.offloaded, planned(spec, given, "zero3-offload"))


def readme() -> str:
    def rows() -> Iterator[Sequence[object]]:
        for cell in all_cells():
            planned = f"{cell.planned / GIB:.1f} GiB"
            if cell.published is None:
                yield cell.model, cell.trained, "out of memory", f"{planned} of 80", ""
            else:
                yield cell.model, cell.trained, f"{cell.published:g} GB", planned, f"{error(cell):+.1%}"

    return table(("model", "trained", "published", "planned", "difference"), rows())


def error(cell: Cell) -> float:
    assert cell.published is not None
    return cell.planned / GIB / cell.published - 1


TABLES: dict[str, Callable[[], str]] = {"terms": terms, "batches": batches, "peft-readme": readme}


def render(text: str) -> str:
    return BLOCK.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def main(check: bool) -> int:
    text = PAGE.read_text()
    drawn = render(text)
    if check and drawn != text:
        print("docs/memory.md differs from the planner; run docs/memory_tables.py")
        return 1
    if not check:
        PAGE.write_text(drawn)
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv))
