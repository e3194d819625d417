"""What the weights of a training take of a GPU at least, and what is said where that is more than it has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from luthier_api.exitcodes import ExitCode
from luthier_api.run import FineTuneRun, Gpu, Weights
from luthier_api.status import Plan
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace.gpu_memory import check, least_bytes

PREFERENCE: dict[str, Any] = {"task": "preference"}
KEPT = PREFERENCE | {"preference": {"precomputeReference": True}}
SEVEN, LORA = 7_000_000_000, 40_000_000


def run(memory: int | None, gpus: int = 8, **spec: Any) -> FineTuneRun:
    base = {
        "task": "causal-lm",
        "model": {"id": "org/model"},
        "dataset": {"id": "org/chats"},
        "training": {"batchSize": 8},
        "resources": {"gpusPerNode": gpus} | ({"gpuClass": "l4"} if gpus else {}),
    }
    return FineTuneRun(name="bot", workspace="/w", gpu=Gpu(memory=memory), spec=base | spec)  # type: ignore[arg-type]


def weights(learning: int) -> Weights:
    return Weights(
        total=SEVEN,
        learning=learning,
        tensors=1,
        state_bytes=8 * learning,
        adapters=learning < SEVEN,
        computed_bytes=2,
        source_bytes=2,
    )


@dataclass(frozen=True)
class Case:
    method: str
    strategy: str
    bytes_of_a_weight: float
    quantization: str | None = None
    spec: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case(method="full", strategy="none", bytes_of_a_weight=16),
    Case(method="full", strategy="ddp", bytes_of_a_weight=16),
    Case(method="full", strategy="zero2", bytes_of_a_weight=2),
    Case(method="full", strategy="zero3", bytes_of_a_weight=2 / 8),
    Case(method="full", strategy="zero3-offload", bytes_of_a_weight=0),
    Case(method="lora", strategy="ddp", bytes_of_a_weight=2),
    Case(method="lora", strategy="ddp", bytes_of_a_weight=1, quantization="int8"),
    Case(method="qlora", strategy="ddp", bytes_of_a_weight=0.5),
    Case(method="full", strategy="ddp", bytes_of_a_weight=18, spec=PREFERENCE),
    Case(method="full", strategy="zero2", bytes_of_a_weight=4, spec=PREFERENCE),
    Case(method="full", strategy="ddp", bytes_of_a_weight=16, spec=KEPT),
    Case(method="lora", strategy="ddp", bytes_of_a_weight=2, spec=PREFERENCE),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.method} {case.strategy} {case.quantization} {case.spec}"
)
def test_the_least_that_weights_take(case: Case) -> None:
    model = {"id": "org/model"} | ({"quantization": {"type": case.quantization}} if case.quantization else {})
    given = run(None, method={"type": case.method}, model=model, **case.spec)
    plan = Plan(strategy=case.strategy, world_size=8)
    assert least_bytes(given.spec, plan, weights(SEVEN if case.method == "full" else LORA)) == int(
        SEVEN * case.bytes_of_a_weight
    )


def test_a_model_that_is_larger_than_the_gpu_is_refused_before_it_takes_one() -> None:
    plan = Plan(strategy="ddp", world_size=8)
    with pytest.raises(Failure) as refused:
        check(run(10 << 30), plan, weights(LORA))
    assert refused.value.code == ExitCode.INVALID_SPEC
    assert refused.value.message.startswith(
        "spec.resources.gpuClass: the weights alone take at least 14.0 GB of each GPU, and one of class l4 has 10.7 GB."
    )
    check(run(24 << 30), plan, weights(LORA))
    check(run(None), plan, weights(LORA))
    check(run(10 << 30, gpus=0), plan, weights(LORA))
