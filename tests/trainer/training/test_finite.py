"""Numbers that are not finite (NaN, infinite) never reach a checkpoint or a result, and no run that made them ends as
Completed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
from prepared_workspace import prepared_run
from safetensors.torch import load_file, save_file

from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Heartbeat
from luthier_trainer.training.finite import changing_weights, nonfinite_names
from luthier_trainer.training.result import _check_weights
from luthier_trainer.workspace.manifest import problems

STEPS = 6
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def data(prose_data: DatasetDict) -> DatasetDict:
    return DatasetDict(train=prose_data["train"].select(range(48)), eval=prose_data["eval"].select(range(4)))


Spoil = Callable[[Any, int], None]


def gradients_at(*steps: int) -> Spoil:
    """One element of the gradient of one weight is NaN, in these steps."""

    def spoil(model: Any, step: int) -> None:
        weight = next(p for p in model.parameters() if p.requires_grad)
        for hook in getattr(model, "spoiling", []):
            hook.remove()
        model.spoiling = [
            weight.register_hook(
                lambda gradient: gradient.flatten().index_fill(0, torch.tensor(0), NAN).view_as(gradient)
            )
        ]
        if step not in steps:
            model.spoiling.pop().remove()

    return spoil


def weights_at(when: int) -> Spoil:
    """One element of one weight is infinite before this step, beyond the last for after it."""

    def spoil(model: Any, step: int) -> None:
        if step == when:
            with torch.no_grad():
                model.model.norm.weight[0] = INF

    return spoil


def run_spoiled(
    spoil: Spoil, monkeypatch: pytest.MonkeyPatch, root: Path, llama: Path, data: DatasetDict, **spec: Any
) -> Any:
    """Train with `spoil` called before each step, and once more after the last has been saved. Saves after each other
    step; keeps one.
    """

    class Spoiler(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spoil(self.loop.model, state.global_step + 1)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps:
                spoil(self.loop.model, state.max_steps + 1)

    monkeypatch.setattr(train, "Heartbeat", Spoiler)
    notices.forget()
    training = {"maxSteps": STEPS, "learningRate": 1e-3, "saveSteps": 2, "keepCheckpoints": 1} | spec.pop(
        "training", {}
    )
    return train.main(prepared_run(root, llama, data, training=training, **spec))


METHODS: list[dict[str, Any]] = [{"type": "full"}, {"type": "lora", "rank": 2}]


@pytest.mark.parametrize("method", METHODS, ids=[m["type"] for m in METHODS])
def test_one_such_gradient_costs_its_own_update(
    method: dict[str, Any], tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last step, where nothing after it would show: the weights are those of the step before it."""
    message = run_spoiled(
        gradients_at(STEPS),
        monkeypatch,
        tmp_path / "a",
        llama,
        data,
        method=method,
        training={"saveSteps": 1, "keepCheckpoints": 2},
    )
    file = "model.safetensors" if method["type"] == "full" else "adapter_model.safetensors"
    before, after = (load_file(tmp_path / f"a/checkpoints/checkpoint-{step}" / file) for step in (STEPS - 1, STEPS))
    result = load_file(tmp_path / "a/result" / file)
    assert message.reason == "Completed"
    assert all(torch.equal(before[name], after[name]) and torch.equal(before[name], result[name]) for name in before)
    assert notices.given()[-1].startswith(
        "spec.dataset: 1 of 6 updates were not applied, because their gradients were not finite"
    )


def test_what_comes_after_it_is_as_if_it_had_not_been(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimizer's moments, too: recomputed with plain torch over the gradients of the other steps."""
    recorded: list[dict[str, torch.Tensor]] = []
    spoil = gradients_at(3)

    class Recorder(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            spoil(self.loop.model, state.global_step + 1)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            recorded.append({name: p.grad.clone() for name, p in self.loop.model.named_parameters()})
            rates.append(self.loop.optimizer.param_groups[0]["lr"])

    rates: list[float] = []
    monkeypatch.setattr(train, "Heartbeat", Recorder)
    train.main(
        prepared_run(
            tmp_path / "a", llama, data, training={"maxSteps": STEPS, "learningRate": 1e-3, "weightDecay": 0.0}
        )
    )
    name = "model.layers.0.mlp.up_proj.weight"
    weight = torch.nn.Parameter(load_file(llama / "model.safetensors")[name].float())
    optimizer = torch.optim.AdamW([weight], weight_decay=0.0)
    for step, (gradients, rate) in enumerate(zip(recorded, rates, strict=True), 1):
        if step == 3:
            continue
        weight.grad, optimizer.param_groups[0]["lr"] = gradients[name], rate
        optimizer.step()
    assert torch.allclose(load_file(tmp_path / "a/result/model.safetensors")[name], weight, atol=1e-6)


@dataclass(frozen=True)
class Case:
    name: str
    spoil: Spoil
    message: str
    newest: str


ENDS = [
    Case(
        name="three gradients in a row",
        spoil=gradients_at(3, 4, 5, 6),
        message="the gradients of 3 steps in a row, up to step 5, were not finite",
        newest="checkpoint-4",
    ),
    Case(
        name="gradients from the first",
        spoil=gradients_at(1, 2, 3),
        message="the gradients of 3 steps in a row, up to step 3, were not finite",
        newest="checkpoint-2",
    ),
    Case(
        name="a weight, after the last save",
        spoil=weights_at(7),
        message="the held-out loss is nan at step 6",
        newest="checkpoint-6",
    ),
]


@pytest.mark.parametrize("case", ENDS, ids=lambda case: case.name)
def test_the_run_has_diverged(
    case: Case, tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Failure) as caught:
        run_spoiled(case.spoil, monkeypatch, tmp_path / "a", llama, data)
    assert caught.value.code.reason == "Diverged"
    assert case.message in caught.value.message
    assert (
        f"newest good checkpoint is {tmp_path}/a/checkpoints/{case.newest}; the steps after it are lost"
        in caught.value.message
    )
    assert [p.name for p in (tmp_path / "a/checkpoints").iterdir()] == [case.newest]
    assert problems(tmp_path / "a/checkpoints" / case.newest) == []
    assert not (tmp_path / "a/result").exists()


def test_weights_that_are_not_finite_are_not_saved(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The embedding of a token that no row has spoils no loss and no gradient: the save has to find it."""
    unused = min(set(range(512)) - {token for row in data["train"]["input_ids"] for token in row})

    def spoil(model: Any, step: int) -> None:
        if step == 3:
            model.get_input_embeddings().weight.data[unused] = INF

    with pytest.raises(
        Failure,
        match=r"1 weights of the model, among them model\.embed_tokens\.weight, are not finite numbers at step 4",
    ) as caught:
        run_spoiled(spoil, monkeypatch, tmp_path / "a", llama, data)
    assert caught.value.code.reason == "Diverged"
    assert [p.name for p in (tmp_path / "a/checkpoints").iterdir()] == ["checkpoint-2"]


def test_a_run_none_of_whose_updates_was_applied(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Failure, match="the gradients of all 1 steps up to step 1 were not finite") as caught:
        run_spoiled(gradients_at(1), monkeypatch, tmp_path / "a", llama, data, training={"maxSteps": 1})
    assert caught.value.code.reason == "Diverged"


FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_one_element_among_many(dtype: torch.dtype, value: float) -> None:
    good = torch.zeros(1000).to(dtype)
    bad = torch.zeros(1000)
    bad[500] = value
    tensors = [
        ("good", good),
        ("bad", bad.to(dtype)),
        ("empty", good[:0]),
        ("packed", torch.full((8,), 255, dtype=torch.uint8)),
    ]
    assert nonfinite_names(tensors) == ["bad"]


def divided(shard: list[float], rank: int, size: int) -> torch.nn.Module:
    """A weight of `size` numbers of which this rank holds a shard, as DeepSpeed's ZeRO-3 leaves it."""
    model = torch.nn.Linear(1, 1, bias=False)
    weight: Any = model.weight
    weight.ds_tensor, weight.ds_numel, weight.ds_zero_partition_rank = torch.tensor(shard), size, rank
    return model


spoilt = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.constant_(spoilt.weight, NAN)
SHARDS = {
    "what fills the last shard up is no weight": (divided([3.0, NAN], rank=1, size=3), []),
    "a shard of nothing else": (divided([NAN, INF], rank=2, size=3), []),
    "a weight of the last shard": (divided([NAN, 0.0], rank=1, size=3), ["weight"]),
    "a weight of the first shard": (divided([1.0, NAN], rank=0, size=3), ["weight"]),
    "a weight that nobody divides": (spoilt, ["weight"]),
}


@pytest.mark.parametrize(("model", "expect"), SHARDS.values(), ids=SHARDS)
def test_what_a_process_holds_of_a_divided_weight(model: torch.nn.Module, expect: list[str]) -> None:
    assert nonfinite_names(changing_weights(model)) == expect


def test_the_files_of_a_result(tmp_path: Path) -> None:
    """Shards, with what quantisation puts beside its packed weights; a mask may be infinite."""
    save_file(
        {"a": torch.zeros(4), "a.absmax": torch.ones(2), "mask": torch.full((2, 2), -INF)},
        tmp_path / "model-00001-of-00002.safetensors",
    )
    save_file({"b": torch.zeros(4)}, tmp_path / "model-00002-of-00002.safetensors")
    _check_weights(tmp_path, {"mask"})
    save_file({"b": torch.tensor([0.0, NAN])}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(
        Failure, match=r"1 of 1 tensors of the result's model-00002-of-00002.safetensors, among them b, are not finite"
    ) as caught:
        _check_weights(tmp_path, {"mask"})
    assert caught.value.code.reason == "Diverged"
