"""Weights that rest in bf16 learn as those in fp32 do, where plain bf16 loses small updates; and go on after a stop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from cases.methods import method_of
from datasets import DatasetDict
from prepared_workspace import losses, prepared_run
from safetensors.torch import load_file
from trainer.training.test_optimizers import stop_at, trained
from transformers import AutoConfig

from luthier_trainer.methods.trainable import tensors_of
from luthier_trainer.models.inspect import skeleton
from luthier_trainer.training import stochastic_rounding
from luthier_trainer.training.optimizers import withholding
from luthier_trainer.training.stochastic_rounding import round_at_random
from luthier_trainer.workspace.optimizer_state import Tensor, state_bytes

WEIGHTS = 8192  # bitsandbytes keeps 8 bits from 4,096 weights on
SMALL = 1e-4  # beside weights of 1, whose neighbours in bf16 are 1/128 and 1/256 away
UPDATES = 50


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.5, 3.0e38, torch.inf, -torch.inf, 2.0**-130])
def test_what_bf16_can_express_stays(value: float) -> None:
    exact = torch.full((100,), value).bfloat16()
    rounded = torch.empty_like(exact)
    round_at_random(rounded, exact.float(), generator())
    assert torch.equal(rounded, exact)


@pytest.mark.parametrize("value", [1 + 1 / 512, 1.001, -0.01234, 1e-20])
def test_the_mean_of_what_is_rounded_is_the_number(value: float) -> None:
    rounded = torch.empty(100_000, dtype=torch.bfloat16)
    round_at_random(rounded, torch.full((100_000,), value), generator())
    assert len(rounded.unique()) == 2
    assert rounded.double().mean().item() == pytest.approx(value, rel=5e-5)


@dataclass(frozen=True)
class Optimizer:
    name: Any
    """Of the spec."""
    plain: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    ours: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def groups(weights: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": weights, "weight_decay": 0.0}]


OPTIMIZERS = [
    Optimizer(
        name="adamw_torch_fused",
        plain=lambda weights: torch.optim.AdamW(weights, lr=SMALL, weight_decay=0.0, fused=True),
        ours=lambda weights: stochastic_rounding.AdamW(groups(weights), SMALL, (0.9, 0.999), 1e-8, seed=1),
    ),
    Optimizer(
        name="adamw_8bit",
        plain=lambda weights: bitsandbytes.optim.AdamW8bit(weights, lr=SMALL, weight_decay=0.0),
        ours=lambda weights: stochastic_rounding.rounding(bitsandbytes.optim.AdamW8bit)(
            groups(weights), seed=1, lr=SMALL
        ),
    ),
    Optimizer(
        name="paged_adamw_8bit",
        plain=lambda weights: bitsandbytes.optim.PagedAdamW8bit(weights, lr=SMALL, weight_decay=0.0),
        ours=lambda weights: stochastic_rounding.rounding(bitsandbytes.optim.PagedAdamW8bit)(
            groups(weights), seed=1, lr=SMALL
        ),
    ),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
def test_small_updates_are_lost_in_plain_bf16_alone(optimizer: Optimizer) -> None:
    """Each update is 1e-4. In fp32 weights of 1 come to 0.995."""
    moved = {}
    for kind, dtype, make in (
        ("fp32", torch.float32, optimizer.plain),
        ("plain bf16", torch.bfloat16, optimizer.plain),
        ("ours", torch.bfloat16, optimizer.ours),
    ):
        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
        weight = torch.nn.Parameter(torch.ones(WEIGHTS, dtype=dtype))
        update = make([weight])
        for _ in range(UPDATES):
            weight.grad = torch.ones_like(weight)
            update.step()
        moved[kind] = 1 - weight.detach().double().mean().item()
    assert moved["fp32"] == pytest.approx(UPDATES * SMALL, rel=1e-3)
    assert moved["plain bf16"] == 0
    assert moved["ours"] == pytest.approx(UPDATES * SMALL, rel=0.05)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=lambda optimizer: optimizer.name)
def test_processes_round_alike_and_a_loaded_state_goes_on(optimizer: Optimizer) -> None:
    """Whatever random numbers a process has drawn beside."""
    gradients = [torch.randn(WEIGHTS, generator=generator()).bfloat16() for _ in range(4)]

    def course(stop: int | None) -> tuple[torch.Tensor, dict[str, Any]]:
        bitsandbytes.optim.GlobalOptimManager.get_instance().initialize()
        weight = torch.nn.Parameter(torch.ones(WEIGHTS, dtype=torch.bfloat16))
        small = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
        update = withholding(optimizer.ours([weight, small]))
        for number, gradient in enumerate(gradients):
            if number == stop:
                held = update.state_dict()
                torch.rand(1)
                update = withholding(optimizer.ours([weight, small]))
                update.load_state_dict(held)
            weight.grad, small.grad = gradient, gradient[:8].clone()
            update.step()
        return torch.cat([weight.detach(), small.detach()]), update.state_dict()

    whole, held = course(stop=None)
    resumed, _ = course(stop=2)
    assert torch.equal(whole, resumed)
    kept = sum(value.nbytes for value in tensors_in(held["state"][0]) if value.ndim)
    # bitsandbytes' two tables of 256 numbers are the same for all tensors.
    tables = 0 if optimizer.name == "adamw_torch_fused" else 2 * 256 * 4
    assert kept - tables == state_bytes(optimizer.name, "bf16", Tensor((WEIGHTS,)))


def tensors_in(state: dict[str, Any]) -> Iterator[torch.Tensor]:
    """bitsandbytes puts a part of its state into an inner dict."""
    for value in state.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value


def test_an_update_that_is_withheld_changes_nothing() -> None:
    weight = torch.nn.Parameter(torch.ones(WEIGHTS, dtype=torch.bfloat16))
    update = stochastic_rounding.AdamW(groups([weight]), 0.1, (0.9, 0.999), 1e-8, seed=1)
    weight.grad = torch.full_like(weight, torch.nan)
    update.found_inf = torch.ones(())
    assert withholding(update) is update
    assert type(update) is stochastic_rounding.AdamW, "it withholds by itself"
    update.step()
    assert torch.equal(weight.detach(), torch.ones_like(weight))
    assert update.state[weight]["step"] == 0


STEPS, RATE = 8, 5e-5


def job(root: Path, llama: Path, data: DatasetDict, **training: Any) -> Any:
    common = {"precision": "bf16", "maxSteps": STEPS, "batchSize": 4, "learningRate": RATE, "schedule": "constant"}
    return prepared_run(root, llama, data, training=common | training)


def test_a_training_learns_as_with_weights_in_fp32_and_goes_on_after_a_stop(
    tmp_path: Path,
    llama: Path,
    prose_data: DatasetDict,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    data = DatasetDict(train=prose_data["train"].select(range(32)), eval=prose_data["eval"].select(range(2)))
    fp32 = job(tmp_path / "fp32", llama, data)
    assert trained(fp32) == 0
    run = job(tmp_path / "bf16", llama, data, parameterPrecision="bf16")
    assert trained(run) == 0
    assert "bf16, weights in bf16," in capfd.readouterr().out
    assert losses(run) == pytest.approx(losses(fp32), abs=0.01)
    assert losses(run)[-1] != losses(run)[0]

    begin, whole, exact = (
        load_file(path / "model.safetensors") for path in (llama, tmp_path / "bf16/result", tmp_path / "fp32/result")
    )
    name = "model.layers.0.mlp.up_proj.weight"
    course, wanted = whole[name].double() - begin[name].double(), exact[name].double() - begin[name].double()
    # Each weight is off by the rounding, but the update as a whole has the direction and the size of that in fp32.
    assert (course * wanted).sum() / (wanted * wanted).sum() == pytest.approx(1, abs=0.1)

    run = job(tmp_path / "again", llama, data, parameterPrecision="bf16")
    stop_at(run, 3, monkeypatch)
    assert trained(run) == 0
    resumed = load_file(tmp_path / "again/result/model.safetensors")
    assert {name for name, weight in whole.items() if not torch.equal(weight, resumed[name])} == set()
    tensors = tensors_of(
        skeleton(AutoConfig.from_pretrained(llama), "causal-lm", "spec.model"), method_of(type="full"), ["lm_head"]
    )
    saved = next((tmp_path / "again").rglob("optimizer.pt"))
    planned = sum(state_bytes("adamw_torch_fused", "bf16", tensor) for tensor in tensors)
    assert saved.stat().st_size == pytest.approx(planned, rel=0.2)
