"""How long a step takes, about: what makes it longer, and what all steps come to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Compute, FineTuneRun, Gpu, StepMemory, Weights
from luthier_api.status import Plan
from luthier_trainer.workspace import gpu_memory, layout, speed
from luthier_trainer.workspace.layout import Facts
from luthier_trainer.workspace.speed import Work

WEIGHTS = Weights(
    total=8 * 10**9,
    learning=8 * 10**9,
    tensors=300,
    state_bytes=0,
    adapters=False,
    computed_bytes=2,
    source_bytes=2,
)
ADAPTER = WEIGHTS.model_copy(update={"learning": 10**7, "adapters": True})
COMPUTE = Compute(
    multiplied=7_504_924_672,
    head=525_336_576,
    learning=7_504_924_672,
    attention_width=32 * 4096,
    length=4096,
    units_a_row=4096,
)
PEAK = 989e12
H100 = Gpu(memory=80 * 10**9, peak_flops=PEAK, bandwidth=3.35e12)


def plan(**changes: Any) -> Plan:
    return Plan(strategy="ddp", world_size=8, micro_batch_size=1, accumulation_steps=4, steps=100).model_copy(
        update=changes
    )


def test_a_step_of_which_only_products_are_known_reaches_a_part_of_the_peak() -> None:
    """Of Llama-3.1-8B, trained whole: 48.3 GFLOP a token, of which an H100 does 0.38 × 989 T/s, less for few tokens."""
    expected = 48.25e9 * 4096 / (0.38 * PEAK * 4096 / (4096 + 512))
    found = speed.pass_seconds(Work(COMPUTE, WEIGHTS), recomputed=False, rows=1, gpu=H100)
    assert found == pytest.approx(expected, rel=1e-3)


STEP = StepMemory(
    checkpointing=False,
    padded=False,
    kernels=10_000,
    moved_fixed=2 * 10**9,
    moved_per_row=10**12,
    kept_fixed=0,
    kept_per_row=0,
    moments=[],
)


@dataclass(frozen=True)
class PassCase:
    name: str
    rows: int
    compute: Compute
    seconds: float
    gpu: Gpu = H100


PASSES = [
    PassCase(
        name="products, and what is read and written",
        rows=1,
        compute=COMPUTE,
        seconds=48.25e9 * 4096 / (0.8 * PEAK) + 1002e9 / (speed.MOVING * 3.35e12),
    ),
    PassCase(
        name="a memory of unknown speed",
        rows=1,
        compute=COMPUTE,
        gpu=Gpu(peak_flops=PEAK),
        seconds=48.25e9 * 4096 / (0.8 * PEAK) + 1002e9 / (speed.MOVING * PEAK / 250),
    ),
    PassCase(
        name="a GPU that waits for Python",
        rows=0,
        compute=COMPUTE,
        seconds=10_000 * speed.LAUNCH_SECONDS,
    ),
]


@pytest.mark.parametrize("case", PASSES, ids=lambda case: case.name)
def test_what_a_pass_takes(case: PassCase) -> None:
    found = speed.pass_seconds(Work(case.compute, WEIGHTS, STEP), recomputed=False, rows=case.rows, gpu=case.gpu)
    assert found == pytest.approx(case.seconds, rel=1e-3)


@dataclass(frozen=True)
class SlowerCase:
    name: str
    faster: dict[str, Any]
    slower: dict[str, Any]
    times: float
    """How much longer a step takes at least."""
    weights: Weights = field(default=WEIGHTS)


SLOWER = [
    SlowerCase(
        name="recomputing",
        faster={"gradient_checkpointing": False},
        slower={"gradient_checkpointing": True},
        times=1.2,
    ),
    SlowerCase(
        name="more passes over fewer rows",
        faster={"micro_batch_size": 4, "accumulation_steps": 1},
        slower={"micro_batch_size": 1, "accumulation_steps": 4},
        times=1.05,
    ),
    SlowerCase(name="weights in the node's memory", faster={}, slower={"strategy": "zero3-offload"}, times=2),
    SlowerCase(
        name="weights are gathered in each pass",
        faster={},
        slower={"strategy": "zero3"},
        times=1.1,
        weights=ADAPTER,
    ),
]


@pytest.mark.parametrize("case", SLOWER, ids=lambda case: case.name)
def test_what_makes_a_step_longer(case: SlowerCase) -> None:
    fast, slow = (
        speed.step_seconds(plan(**changes), 1, Work(COMPUTE, case.weights), H100)
        for changes in (case.faster, case.slower)
    )
    assert slow > case.times * fast


@dataclass(frozen=True)
class ExchangeCase:
    strategy: str
    bytes: float
    """That each of 8 processes exchanges in a step of 4 passes, before the share of 7/8."""
    exchanges: int
    nodes: int = 1
    recomputed: bool = False


N = 8e9
EXCHANGES = [
    ExchangeCase("ddp", bytes=2 * 4 * N, exchanges=2),
    ExchangeCase("ddp", bytes=2 * 4 * N, exchanges=2, nodes=2),
    ExchangeCase("zero2", bytes=(4 + 1) * 2 * N, exchanges=5),
    ExchangeCase("zero2-offload", bytes=(4 + 1) * 2 * N, exchanges=5),
    ExchangeCase("zero3", bytes=4 * (2 + 1) * 2 * N, exchanges=4 * 2 * 300),
    ExchangeCase("zero3", bytes=4 * (3 + 1) * 2 * N, exchanges=4 * 3 * 300, recomputed=True),
    ExchangeCase("fsdp", bytes=4 * (2 * 2 + 4) * N, exchanges=4 * 3 * 33, recomputed=True),
]


@pytest.mark.parametrize("case", EXCHANGES, ids=lambda case: f"{case.strategy} {case.nodes} {case.recomputed}")
def test_what_processes_exchange(case: ExchangeCase) -> None:
    bytes_per_second = speed.NETWORK_BYTES_PER_SECOND if case.nodes > 1 else speed.NODE_BYTES_PER_SECOND
    expected = case.bytes * 7 / 8 / bytes_per_second + case.exchanges * speed.GATHER_SECONDS
    planned = plan(strategy=case.strategy, gradient_checkpointing=case.recomputed)
    assert speed.exchange_seconds(planned, case.nodes, WEIGHTS) == pytest.approx(expected)
    assert speed.exchange_seconds(plan(world_size=1), 1, WEIGHTS) == 0


def run(peak_flops: float | None = PEAK, **changes: Any) -> FineTuneRun:
    document = {
        "task": "causal-lm",
        "model": {"id": "org/model"},
        "dataset": {"id": "org/chats"},
        "training": {"batchSize": 32},
        "resources": {"gpusPerNode": 8},
    }
    return FineTuneRun(
        name="bot",
        workspace="/w",
        gpu=Gpu(memory=80 * 10**9, peak_flops=peak_flops),
        spec=FineTuneJobSpec.model_validate(document | changes),
    )


def facts(compute: Compute | None) -> Facts:
    return Facts(gpu_memory.without_model(run().spec, WEIGHTS, "not computed"), WEIGHTS, compute)


def test_what_all_steps_come_to() -> None:
    found = layout.estimated(run(), plan(), facts(COMPUTE))
    assert found.trainable_parameters == WEIGHTS.learning
    assert found.tokens == 100 * 32 * 4096
    assert found.flops == pytest.approx(48.25e9 * 100 * 32 * 4096, rel=1e-3)
    step = speed.step_seconds(plan(), 1, Work(COMPUTE, WEIGHTS), H100)
    assert found.seconds == pytest.approx(100 * step, rel=5e-3)
    assert found.gpu_hours == pytest.approx(800 * step / 3600, rel=5e-3)


def test_the_time_of_a_short_job_is_not_rounded_to_seconds() -> None:
    small = COMPUTE.model_copy(update={"multiplied": 10**6, "learning": 10**6, "attention_width": 64})
    found = layout.estimated(run(), plan(steps=3, world_size=1, strategy="none"), facts(small))
    assert found.seconds is not None
    step = speed.step_seconds(plan(world_size=1, strategy="none"), 1, Work(small, WEIGHTS), H100)
    assert 0 < found.seconds == pytest.approx(3 * step, rel=5e-3)


@dataclass(frozen=True)
class UnknownCase:
    name: str
    run: FineTuneRun
    compute: Compute | None
    known: set[str]


UNKNOWN = [
    UnknownCase(
        name="the speed of the GPU",
        run=run(peak_flops=None),
        compute=COMPUTE,
        known={"tokens", "flops"},
    ),
    UnknownCase(name="what a row takes", run=run(), compute=None, known=set()),
    UnknownCase(
        name="what it takes to write completions",
        run=run(task="grpo", grpo={"rewards": [{"type": "exactMatch", "column": "answer"}]}),
        compute=COMPUTE,
        known={"tokens", "flops"},
    ),
    UnknownCase(
        name="tokens of images",
        run=run(),
        compute=COMPUTE.model_copy(update={"unit": "row"}),
        known={"flops", "seconds", "gpu_hours"},
    ),
]


@pytest.mark.parametrize("case", UNKNOWN, ids=lambda case: case.name)
def test_what_is_not_known_is_left_out(case: UnknownCase) -> None:
    found = layout.estimated(case.run, plan(), facts(case.compute))
    shown = found.model_dump(include={"tokens", "flops", "seconds", "gpu_hours"}, exclude_none=True)
    assert set(shown) == case.known
