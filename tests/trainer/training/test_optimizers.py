"""Each optimiser changes the weights as the plain one does, goes on after a stop, and keeps as much as was planned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import schedulefree
import torch
from cases.methods import method_of
from cases.quick import quick
from datasets import DatasetDict
from prepared_workspace import prepared_run
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.optimization import Adafactor

from luthier_api.optimizers import OPTIMIZERS
from luthier_trainer.methods.trainable import tensors_of
from luthier_trainer.models.inspect import skeleton
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Callback, Heartbeat
from luthier_trainer.training.optimizers import withholding
from luthier_trainer.workspace.optimizer_state import STATE_BYTES

STEPS, RATE, DECAY = 6, 1e-3, 0.1
HIDDEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
Plain = Callable[[dict[str, torch.nn.Parameter]], list[torch.optim.Optimizer]]


def groups(weights: dict[str, torch.nn.Parameter]) -> list[dict[str, Any]]:
    """As transformers forms them: norms do not decay."""
    decayed = [weight for name, weight in weights.items() if "norm" not in name]
    rest = [weight for name, weight in weights.items() if "norm" in name]
    return [{"params": decayed, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]


def muon(weights: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    hidden = {name: weight for name, weight in weights.items() if name.split(".")[-2] in HIDDEN}
    others = {name: weight for name, weight in weights.items() if name not in hidden}
    return [
        torch.optim.Muon(hidden.values(), lr=RATE, weight_decay=DECAY, momentum=0.9, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups(others), lr=RATE, fused=True),
    ]


@dataclass(frozen=True)
class Case:
    name: str
    plain: Plain
    training: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case(
        name="adamw_torch_fused",
        plain=lambda weights: [torch.optim.AdamW(groups(weights), lr=RATE, betas=(0.8, 0.99), eps=1e-6, fused=True)],
        training={"optimizerOptions": {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-6}},
    ),
    Case(
        name="adamw_8bit",
        plain=lambda weights: [bitsandbytes.optim.AdamW8bit(groups(weights), lr=RATE)],
    ),
    Case(
        name="paged_adamw_8bit",
        plain=lambda weights: [bitsandbytes.optim.AdamW8bit(groups(weights), lr=RATE)],
    ),
    Case(
        name="adafactor",
        plain=lambda weights: [Adafactor(groups(weights), lr=RATE, scale_parameter=False, relative_step=False)],
    ),
    Case(
        name="lion_32bit",
        plain=lambda weights: [bitsandbytes.optim.Lion32bit(groups(weights), lr=RATE, betas=(0.9, 0.99))],
    ),
    Case(
        name="lion_8bit",
        plain=lambda weights: [bitsandbytes.optim.Lion8bit(groups(weights), lr=RATE, betas=(0.8, 0.95))],
        training={"optimizerOptions": {"beta1": 0.8, "beta2": 0.95}},
    ),
    Case(
        name="muon",
        plain=muon,
        training={"optimizerOptions": {"momentum": 0.9}},
    ),
    Case(
        name="schedule_free_adamw",
        plain=lambda weights: [schedulefree.AdamWScheduleFree(groups(weights), lr=RATE, warmup_steps=2)],
        training={"warmupSteps": 2},
    ),
]


def test_the_cases_cover_all_optimisers() -> None:
    assert [case.name for case in CASES] == list(OPTIMIZERS) == list(STATE_BYTES)


class Recorder(Callback):
    """Keeps the weights before the first step, and the gradients of each step as the optimiser sees them."""

    first: dict[str, torch.Tensor]

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, *args: Any, **_: Any) -> None:
        self.first = {name: weight.detach().clone() for name, weight in self.loop.model.named_parameters()}

    def on_pre_optimizer_step(self, *args: Any, **_: Any) -> None:
        self.gradients.append({n: w.grad.clone() for n, w in self.loop.model.named_parameters() if w.grad is not None})


def trained(run: Any) -> int:
    """Train, and return the exit code.

    bitsandbytes remembers settings of weights by their ids, which a later training in the same process may meet again.
    """
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    return train.main(run).code


def make(root: Path, llama: Path, data: DatasetDict, case: Case) -> Any:
    training = {"optimizer": case.name, "schedule": "constant", "maxSteps": STEPS, "learningRate": RATE}
    return prepared_run(root, llama, data, training=training | {"weightDecay": DECAY, "batchSize": 4} | case.training)


@pytest.mark.parametrize("case", quick(CASES, "adamw_torch_fused", "adamw_8bit", "muon", "schedule_free_adamw"))
def test_the_weights_are_those_of_the_plain_optimiser(
    case: Case, tmp_path: Path, llama: Path, prose_data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = DatasetDict(train=prose_data["train"].select(range(32)), eval=prose_data["eval"].select(range(2)))
    recorder = Recorder()

    class Recorded(Heartbeat):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            recorder.loop = self.loop
            recorder.on_train_begin()

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            recorder.on_pre_optimizer_step()

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Recorded)
        assert trained(make(tmp_path / "job", llama, data, case)) == 0
    whole = load_file(tmp_path / "job/result/model.safetensors")

    replayed = {name: torch.nn.Parameter(weight.clone()) for name, weight in recorder.first.items()}
    bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
    plain = case.plain(replayed)
    if case.name.endswith("8bit"):
        # transformers keeps the state of embeddings in 32 bits.
        manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
        manager.override_config(replayed["model.embed_tokens.weight"], "optim_bits", 32)
    for optimizer in plain:
        if hasattr(optimizer, "train"):
            optimizer.train()
    for gradients in recorder.gradients:
        for name, weight in replayed.items():
            weight.grad = gradients[name].clone()
        for optimizer in plain:
            optimizer.step()
    for optimizer in plain:
        if hasattr(optimizer, "eval"):
            optimizer.eval()
    assert len(recorder.gradients) == STEPS
    assert {name for name, weight in whole.items() if not torch.equal(weight, replayed[name])} == set()

    run = make(tmp_path / "again", llama, data, case)
    stop_at(run, 3, monkeypatch)
    assert trained(run) == 0
    resumed = load_file(tmp_path / "again/result/model.safetensors")
    assert {name for name, weight in whole.items() if not torch.equal(weight, resumed[name])} == set()

    tensors = tensors_of(skeleton(AutoConfig.from_pretrained(llama), "causal-lm", ""), method_of(type="full"), [])
    planned = sum(map(STATE_BYTES[case.name], tensors))  # type: ignore[index]
    written = (tmp_path / f"job/checkpoints/checkpoint-{STEPS}/optimizer.pt").stat().st_size
    assert planned <= written <= planned + 1500 * len(tensors)


def stop_at(run: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flag(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                (run_dir() / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Flag)
        assert trained(run) == 75
    (run_dir() / "stop").unlink()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_update_can_be_left_out(case: Case, llama: Path) -> None:
    weights = dict(AutoModelForCausalLM.from_pretrained(llama).named_parameters())
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = torch.full_like(weight, torch.nan)
    for optimizer in map(withholding, case.plain(weights)):
        if hasattr(optimizer, "train"):
            optimizer.train()
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            optimizer.found_inf = torch.tensor(1.0)
        else:
            optimizer.withheld = True  # type: ignore[attr-defined]
        optimizer.step()
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
