"""The adapters beside LoRA: what learns is what plain PEFT has, it learns, goes on after a stop to the last bit, and is
loaded by plain PEFT.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.methods import method_of
from cases.quick import quick
from datasets import DatasetDict
from peft import (
    AdaLoraConfig,
    IA3Config,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from prepared_workspace import losses, prepared_run
from trainer.methods.test_biases import measured
from trainer.training.test_resume import stopped_at
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from luthier_api.generate import Adapter
from luthier_trainer.methods.apply import with_method
from luthier_trainer.methods.table import FAMILIES
from luthier_trainer.methods.trainable import adapter_tensors
from luthier_trainer.models import adapters
from luthier_trainer.models.merge import add_adapters, merge
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train

STEPS = 8


@dataclass(frozen=True)
class Case:
    name: str
    method: dict[str, Any]
    plain: Callable[[], Any]
    """PEFT's own configuration."""
    rate: float
    mergeable: bool = False


ADALORA = {"rank": 2, "initialRank": 4, "initialFraction": 0.25, "finalFraction": 0.25}
CASES = [
    Case(
        name="AdaLoRA",
        method={"type": "adalora", **ADALORA},
        plain=lambda: AdaLoraConfig(
            init_r=4, target_r=2, tinit=2, tfinal=2, total_step=STEPS, lora_alpha=32, target_modules="all-linear"
        ),
        rate=5e-2,
        mergeable=True,
    ),
    Case(
        name="IA3, by PEFT's table of architectures",
        method={"type": "ia3"},
        plain=IA3Config,
        rate=1e-1,
        mergeable=True,
    ),
    Case(
        name="IA3 on chosen modules",
        method={"type": "ia3", "targetModules": ["q_proj", "up_proj"], "feedforwardModules": ["up_proj"]},
        plain=lambda: IA3Config(target_modules=["q_proj", "up_proj"], feedforward_modules=["up_proj"]),
        rate=1e-1,
        mergeable=True,
    ),
    Case(
        name="prompt tuning from the vocabulary",
        method={"type": "prompt", "virtualTokens": 4},
        plain=lambda: PromptTuningConfig(num_virtual_tokens=4),
        rate=5e-2,
    ),
    Case(
        name="p-tuning",
        method={"type": "p-tuning", "virtualTokens": 4, "encoderHiddenSize": 16},
        plain=lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=16),
        rate=5e-2,
    ),
    Case(
        name="p-tuning by an LSTM",
        method={"type": "p-tuning", "virtualTokens": 4, "encoder": "lstm"},
        plain=lambda: PromptEncoderConfig(num_virtual_tokens=4, encoder_reparameterization_type="LSTM"),
        rate=5e-2,
    ),
    Case(
        name="prefix tuning",
        method={"type": "prefix", "virtualTokens": 4},
        plain=lambda: PrefixTuningConfig(num_virtual_tokens=4),
        rate=5e-2,
    ),
    Case(
        name="prefix tuning with projection",
        method={"type": "prefix", "virtualTokens": 4, "projection": True, "encoderHiddenSize": 16},
        plain=lambda: PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=16),
        rate=5e-2,
    ),
]


def learning(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_learns_is_what_plain_peft_has(case: Case, llama: Path) -> None:
    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(llama)

    ours = with_method(base(), method_of(**case.method), "CAUSAL_LM", [], deepspeed=False)
    config = case.plain()
    config.task_type = "CAUSAL_LM"
    plain = get_peft_model(base(), config)
    shapes = {name: tuple(weight.shape) for name, weight in learning(plain).items()}
    assert shapes
    assert {name: tuple(weight.shape) for name, weight in learning(ours).items()} == shapes
    counted = adapter_tensors(base(), method_of(**case.method), [], "CAUSAL_LM")
    assert sorted(tensor.shape for tensor in counted) == sorted(shapes.values())


class Changes(TrainerCallback):
    """Which weights a training has changed."""

    loop: Any

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.before = {name: weight.detach().clone() for name, weight in self.loop.model.named_parameters()}
        self.learning, self.changed = set(learning(self.loop.model)), set[str]()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        # After each step: AdaLoRA sets factors back to 0, as which they begin.
        weights = dict(self.loop.model.named_parameters())
        self.changed |= {name for name in weights if not torch.equal(weights[name], self.before[name])}


@pytest.mark.parametrize("case", quick(CASES, "AdaLoRA", "prefix tuning with projection"))
def test_it_learns_and_goes_on_to_the_last_bit(
    case: Case, tmp_path: Path, llama: Path, prose_data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DatasetDict(train=prose_data["train"].select(range(64)), eval=prose_data["eval"].select(range(4)))
    asked: dict[str, Any] = {
        "method": case.method,
        "training": {"maxSteps": STEPS, "learningRate": case.rate, "microBatchSize": 4},
    }
    changes = Changes()
    run = prepared_run(tmp_path / "job", llama, data, **asked)
    metrics = train.main(run, [changes]).metrics
    assert metrics is not None
    assert changes.changed == changes.learning
    assert metrics["evalLoss"] < metrics["evalLossBefore"]

    again = prepared_run(tmp_path / "again", llama, data, **asked)
    assert stopped_at(again, 5, monkeypatch).code == 75
    resumed = train.main(again).metrics
    assert resumed is not None
    assert (losses(again), resumed["evalLoss"]) == (losses(run), metrics["evalLoss"])

    result = tmp_path / "job/result"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), result)
    assert measured(plain, data) == pytest.approx(metrics["evalLoss"], abs=1e-5)
    if case.mergeable:
        merged = AutoModelForCausalLM.from_pretrained(merge(llama, result, tmp_path / "merged", None, "spec.model"))
        assert measured(merged, data) == pytest.approx(metrics["evalLoss"], abs=1e-5)
        adapters.check_kind(json.loads((result / "adapter_config.json").read_text()), "spec.adapters[0]")
        adapters.check_shapes(result, "spec.adapters[0]", llama, "llama", "text-generation")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            generating = add_adapters(AutoModelForCausalLM.from_pretrained(llama), [result], [1.0], "spec.adapters")
        assert not [warning for warning in told if "rank_pattern" in str(warning.message)]
        assert measured(generating, data) == pytest.approx(metrics["evalLoss"], abs=1e-5)
        with pytest.raises(Failure, match=r"adapters\[0\].weight: "):
            adapters.check_together([result], [Adapter(path="/a", weight=0.5)], "spec.adapters")
    else:
        with pytest.raises(Failure) as failure:
            adapters.check_kind(json.loads((result / "adapter_config.json").read_text()), "spec.adapters[0]")
        assert failure.value.message.endswith(
            "cannot be merged, because virtual tokens are no part of the base's weights. Load it with PEFT, or use one"
            " of: LoRA, AdaLoRA, IA3"
        )


def test_the_budget_of_ranks_is_spent(tmp_path: Path, llama: Path, prose_data: DatasetDict) -> None:
    """As PEFT's example in plain steps: the same ranks are left at the end."""
    data = DatasetDict(train=prose_data["train"].select(range(64)), eval=prose_data["eval"].select(range(4)))
    run = prepared_run(
        tmp_path / "job",
        llama,
        data,
        method={"type": "adalora", **ADALORA, "orthogonalWeight": 0.3},
        training={"maxSteps": STEPS, "learningRate": 5e-2, "schedule": "constant"},
    )
    seen: list[list[list[int]]] = []

    class Rows(TrainerCallback):
        loop: Any

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            inner = self.loop.get_batch_samples

            def noted(*args: Any) -> Any:
                batches, items = inner(*args)
                seen.append([row[mask.bool()].tolist() for row, mask in rows_of(batches[0])])
                return batches, items

            self.loop.get_batch_samples = noted

    train.main(run, [Rows()])
    result = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "job/result")
    ranks = {name: len(weight) for name, weight in result.named_parameters() if "lora_E" in name}
    assert sum(ranks.values()) == 2 * len(ranks)

    torch.manual_seed(run.spec.training.seed)
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=4,
        target_r=2,
        tinit=2,
        tfinal=2,
        total_step=STEPS,
        lora_alpha=32,
        target_modules="all-linear",
        orth_reg_weight=0.3,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config)
    begin = run_begin(run, llama)
    for name, weight in learning(model).items():
        weight.data.copy_(begin[name])
    optimizer = torch.optim.AdamW(learning(model).values(), lr=5e-2, weight_decay=0.0)
    for step, rows in enumerate(seen, 1):
        width = max(len(row) for row in rows)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning(model).values(), 1.0)
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    pattern = model.peft_config["default"].rank_pattern
    assert {name: sum(left) for name, left in pattern.items()} == {
        name.removeprefix("base_model.model."): rank for name, rank in ranks.items()
    }


def rows_of(batch: dict[str, torch.Tensor]) -> Any:
    return zip(batch["input_ids"], batch["attention_mask"], strict=True)


def run_begin(run: Any, llama: Path) -> dict[str, torch.Tensor]:
    """The weights with which the adapters of `run` begin: as they follow from its seed."""
    from transformers import set_seed

    set_seed(run.spec.training.seed)
    base = AutoModelForCausalLM.from_pretrained(llama)
    return learning(with_method(base, run.spec.method, "CAUSAL_LM", [], deepspeed=False))


def test_virtual_tokens_begin_as_a_text(llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    text = "Say what the class does."
    ids = (tokenizer(text)["input_ids"] * 20)[:12]
    table = AutoModelForCausalLM.from_pretrained(llama).get_input_embeddings().weight
    method = method_of(type="prompt", virtualTokens=12, promptText=text)
    model = with_method(AutoModelForCausalLM.from_pretrained(llama), method, "CAUSAL_LM", [], deepspeed=False)
    FAMILIES["prompt"].begin(model, method, tokenizer)
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, table[ids])

    method = method_of(type="prefix", virtualTokens=12, promptText=text)
    model = with_method(AutoModelForCausalLM.from_pretrained(llama), method, "CAUSAL_LM", [], deepspeed=False)
    FAMILIES["prefix"].begin(model, method, tokenizer)
    more = tokenizer("and what not")["input_ids"]
    with torch.no_grad():
        after = model.eval()(input_ids=torch.tensor([more])).logits
        whole = AutoModelForCausalLM.from_pretrained(llama).eval()(input_ids=torch.tensor([ids + more])).logits
    assert (after - whole[:, len(ids) :]).abs().max() < 1e-4


def test_micro_batches_change_nothing_also_where_rows_are_left(
    tmp_path: Path, llama: Path, prose_data: DatasetDict
) -> None:
    """Of 20 rows, 4 are in the last step of an epoch. PEFT alone would add AdaLoRA's penalty to each micro-batch."""
    data = DatasetDict(train=prose_data["train"].select(range(20)), eval=prose_data["eval"].select(range(4)))
    large, small = (
        prepared_run(
            tmp_path / str(micro),
            llama,
            data,
            method={"type": "adalora", **ADALORA, "orthogonalWeight": 5.0},
            training={"maxSteps": 6, "learningRate": 1e-3, "microBatchSize": micro},
        )
        for micro in (8, 2)
    )
    for run in (large, small):
        train.main(run)
    assert losses(large)[0] > 7  # the penalty is in it
    assert losses(small) == pytest.approx(losses(large), abs=1e-4)


def test_adapters_begin_as_the_seed_says(llama: Path) -> None:
    def begun(kind: str, seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        method = method_of(type=kind)
        model = with_method(AutoModelForCausalLM.from_pretrained(llama), method, "CAUSAL_LM", [], deepspeed=False)
        FAMILIES[method.type].begin(model, method, None)
        return learning(model)

    for kind in FAMILIES:
        once, again, other = (begun(kind, seed) for seed in (1, 1, 2))
        assert all(torch.equal(weight, again[name]) for name, weight in once.items()), kind
        assert kind == "ia3" or not all(torch.equal(weight, other[name]) for name, weight in once.items()), kind


def test_magnitudes_of_dora_learn_in_16_bits(llama: Path) -> None:
    """In bf16 a step of 1e-4 would be lost beside a norm of 1."""
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    model = with_method(base, method_of(type="lora", dora=True), "CAUSAL_LM", [], deepspeed=False)
    magnitudes = {name: weight for name, weight in learning(model).items() if "magnitude" in name}
    before = {name: weight.detach().clone() for name, weight in magnitudes.items()}
    optimizer = torch.optim.AdamW(learning(model).values(), lr=1e-4, weight_decay=0.0)
    ids = torch.arange(32).reshape(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert magnitudes
    assert {weight.dtype for weight in magnitudes.values()} == {torch.float32}
    assert all((weight != before[name]).all() for name, weight in magnitudes.items())
