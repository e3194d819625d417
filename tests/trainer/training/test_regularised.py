"""Label smoothing, NEFTune and LoRA+ train the weights that plain transformers and PEFT train, and resume exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from cases.quick import quick
from datasets import DatasetDict
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from peft.optimizers import create_loraplus_optimizer
from prepared_workspace import prepared_run
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Heartbeat

STEPS, RATE = 5, 2e-3
EPSILON = 1e-3  # with a larger one than the default, Adam does not amplify the differences in rounding
Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    name: str
    training: Options
    arguments: Options = field(default_factory=dict)
    """Of plain transformers."""
    micro_batch: int = 2
    """Rows of a micro-batch of plain transformers; 2 of ours."""
    tolerance: float = 1e-6
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None
    """The optimiser of plain PEFT, for adapters."""


CASES = [
    Case(
        name="label smoothing",
        training={"labelSmoothing": 0.2},
        arguments={"label_smoothing_factor": 0.2},
        micro_batch=8,
    ),
    Case(
        name="NEFTune",
        training={"neftuneNoiseAlpha": 10},
        arguments={"neftune_noise_alpha": 10},
    ),
    Case(
        name="LoRA+",
        training={"weightDecay": 0.1, "optimizerOptions": {"loraplusLrRatio": 8}},
        optimizer=lambda model: create_loraplus_optimizer(
            model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=8, loraplus_weight_decay=0.1, fused=True, eps=EPSILON
        ),
    ),
    Case(
        name="LoRA+ in 8 bits",
        training={"optimizer": "adamw_8bit", "optimizerOptions": {"loraplusLrRatio": 8}},
        optimizer=lambda model: create_loraplus_optimizer(
            model, bitsandbytes.optim.AdamW8bit, lr=RATE, loraplus_lr_ratio=8, eps=EPSILON
        ),
    ),
]


@pytest.fixture(scope="module")
def masked(prose_data: DatasetDict) -> DatasetDict:
    """24 rows of several lengths, of which the first third is not learnt."""

    def cut(row: dict[str, Any], index: int) -> dict[str, Any]:
        ids = row["input_ids"][: 12 + index % 7]
        return {"input_ids": ids, "length": len(ids), "loss_mask": [int(3 * i >= len(ids)) for i in range(len(ids))]}

    return DatasetDict(train=prose_data["train"].select(range(24)).map(cut, with_indices=True))


def trained(run: Any) -> int:
    # bitsandbytes remembers settings of weights by their ids, which a later training in the same process may meet again
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    return train.main(run).code


def plain_weights(case: Case, llama: Path, data: DatasetDict, folder: Path) -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    rows = [
        {
            "input_ids": row["input_ids"],
            "attention_mask": [1] * row["length"],
            "labels": [i if on else -100 for i, on in zip(row["input_ids"], row["loss_mask"], strict=True)],
        }
        for row in data["train"]
    ]
    set_seed(42)
    model: Any = AutoModelForCausalLM.from_pretrained(llama)
    if case.optimizer:
        adapters = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, adapters)
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=case.micro_batch,
            gradient_accumulation_steps=8 // case.micro_batch,
            learning_rate=RATE,
            adam_epsilon=EPSILON,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=42,
            **case.arguments,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, padding="longest"),
        train_dataset=rows,  # type: ignore[arg-type]
        optimizers=(case.optimizer(model) if case.optimizer else None, None),
    )
    trainer.train()
    return get_peft_model_state_dict(model) if case.optimizer else dict(model.named_parameters())


@pytest.mark.parametrize("case", quick(CASES, "label smoothing", "LoRA+ in 8 bits"))
def test_the_weights_are_those_of_plain_training(
    case: Case, tmp_path: Path, llama: Path, masked: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(name: str, training: Options) -> Any:
        common = {"maxSteps": STEPS, "learningRate": RATE, "microBatchSize": 2}
        options = {"optimizerOptions": {"epsilon": EPSILON} | training.get("optimizerOptions", {})}
        method = {"type": "lora" if case.optimizer else "full"}
        return prepared_run(tmp_path / name, llama, masked, method=method, training=common | training | options)

    file = "adapter_model.safetensors" if case.optimizer else "model.safetensors"
    assert trained(make("whole", case.training)) == 0
    whole = load_file(tmp_path / "whole/result" / file)
    plain = plain_weights(case, llama, masked, tmp_path / "plain")
    assert {n for n, w in whole.items() if not torch.allclose(w, plain[n], rtol=1e-5, atol=case.tolerance)} == set()

    class Flag(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1:
                (run_dir() / "stop").touch()

    run = make("stopped", case.training)
    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Flag)
        assert trained(run) == 75
    (run_dir() / "stop").unlink()
    assert trained(run) == 0
    resumed = load_file(tmp_path / "stopped/result" / file)
    assert {n for n, w in whole.items() if not torch.equal(w, resumed[n])} == set()

    assert trained(make("without", {})) == 0
    without = load_file(tmp_path / "without/result" / file)
    assert {n for n, w in whole.items() if not torch.allclose(w, without[n], rtol=1e-5, atol=1e-4)}
