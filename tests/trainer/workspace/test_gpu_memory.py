"""What a training takes of a GPU in each layout, from facts of its model, and what is said where a GPU has less."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from luthier_api.run import FineTuneRun, Gpu, MemoryFacts, Moment, StepMemory, Weights
from luthier_api.status import Plan
from luthier_trainer.workspace import gpu_memory
from luthier_trainer.workspace.gpu_memory import peak, tensors, without_model

PREFERENCE: dict[str, Any] = {"task": "preference"}
KEPT = PREFERENCE | {"preference": {"precomputeReference": True}}
TWO_NODES: dict[str, Any] = {"resources": {"nodes": 2, "gpusPerNode": 4}}
SEVEN, LORA = 7_000_000_000, 40_000_000
STATES = ("weights", "reference model", "master weights", "optimizer", "gradients")
GIB = 1 << 30


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
    """That rests on each of 8 GPUs, and of an adapter's weight."""
    of_an_adapter: float = 0
    quantization: str | None = None
    spec: dict[str, Any] = field(default_factory=dict)


# Weights, gradients and Adam's two moments, of which ZeRO spreads a part over 8 processes.
CASES = [
    Case(method="full", strategy="none", bytes_of_a_weight=4 + 4 + 8),
    Case(method="full", strategy="ddp", bytes_of_a_weight=4 + 4 + 8),
    Case(method="full", strategy="zero1", bytes_of_a_weight=2 + 2 + (4 + 8) / 8),
    Case(method="full", strategy="zero2", bytes_of_a_weight=2 + (2 + 4 + 8) / 8),
    Case(method="full", strategy="zero2-offload", bytes_of_a_weight=2),
    Case(method="full", strategy="zero3", bytes_of_a_weight=(2 + 2 + 4 + 8) / 8),
    Case(method="full", strategy="zero3", bytes_of_a_weight=(2 + 2 + 4 + 8) / 8 + 2 / 4, spec=TWO_NODES),
    Case(method="full", strategy="zero3-offload", bytes_of_a_weight=0),
    Case(method="full", strategy="fsdp", bytes_of_a_weight=(4 + 4 + 8) / 8),
    Case(method="lora", strategy="fsdp", bytes_of_a_weight=2 / 8, of_an_adapter=16 / 8),
    Case(method="lora", strategy="ddp", bytes_of_a_weight=2, of_an_adapter=16),
    Case(method="lora", strategy="ddp", bytes_of_a_weight=1, of_an_adapter=16, quantization="int8"),
    Case(method="qlora", strategy="ddp", bytes_of_a_weight=0.5, of_an_adapter=16),
    Case(method="full", strategy="ddp", bytes_of_a_weight=18, spec=PREFERENCE),
    Case(method="full", strategy="zero2", bytes_of_a_weight=4 + (2 + 4 + 8) / 8, spec=PREFERENCE),
    Case(method="full", strategy="ddp", bytes_of_a_weight=16, spec=KEPT),
    Case(method="lora", strategy="ddp", bytes_of_a_weight=2, of_an_adapter=16, spec=PREFERENCE),
]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.method} {case.strategy} {case.quantization} {case.spec}"
)
def test_what_weights_and_their_states_take(case: Case) -> None:
    model = {"id": "org/model"} | ({"quantization": {"type": case.quantization}} if case.quantization else {})
    given = run(None, method={"type": case.method}, model=model, **case.spec)
    plan = Plan(strategy=case.strategy, world_size=1 if case.strategy == "none" else 8)
    facts = without_model(given.spec, weights(SEVEN if case.method == "full" else LORA), "not computed")
    memory = peak(given.spec, plan, facts)
    assert sum(memory.gpu.get(term, 0) for term in STATES) == pytest.approx(
        SEVEN * case.bytes_of_a_weight + LORA * case.of_an_adapter, abs=8
    )
    assert sum(memory.gpu.values()) == memory.gpu_bytes


def facts(**changes: Any) -> MemoryFacts:
    """Of a step whose highest moment depends on the rows and on whether gradients are there from the beginning."""
    loss, end = Moment(fixed=0, per_row=100, gradients=0), Moment(fixed=50, per_row=10, gradients=900)
    step = StepMemory(checkpointing=False, padded=False, kept_fixed=0, kept_per_row=80, moments=[loss, end])
    again = step.model_copy(update={"checkpointing": True, "moments": [Moment(fixed=0, per_row=30, gradients=0)]})
    masked = step.model_copy(update={"padded": True, "moments": [Moment(fixed=7, per_row=100, gradients=0)]})
    return MemoryFacts(
        total=1000,
        learning=250,
        state_bytes=0,
        computed_bytes=2,
        rest_bytes=4,
        weight_bytes=1000,
        gradient_bytes=1000,
        steps=[step, again, masked],
    ).model_copy(update=changes)


@dataclass(frozen=True)
class Layout:
    name: str
    plan: dict[str, Any]
    activations: int
    gradients: int
    facts: dict[str, Any] = field(default_factory=dict)


LAYOUTS = [
    Layout("the optimiser's step has all gradients", {}, activations=0, gradients=1000),
    Layout("the loss", {"micro_batch_size": 16}, activations=1600, gradients=0),
    Layout("gradients of the pass before", {"accumulation_steps": 2}, activations=100, gradients=1000),
    Layout("recomputed", {"micro_batch_size": 40, "gradient_checkpointing": True}, activations=1200, gradients=0),
    Layout("padded", {"micro_batch_size": 16}, activations=1607, gradients=0, facts={"mixed_lengths": True}),
    Layout("one row is not padded", {"accumulation_steps": 2}, 100, 1000, facts={"mixed_lengths": True}),
    Layout("packed", {"accumulation_steps": 2}, 107, 1000, facts={"packed": True}),
]


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_the_highest_moment_depends_on_the_layout(case: Layout) -> None:
    plan = Plan(**{"strategy": "none", "micro_batch_size": 1, "accumulation_steps": 1} | case.plan)
    memory = peak(run(None).spec, plan, facts(**case.facts))
    assert memory.gpu.get("activations", 0) == case.activations
    assert memory.gpu.get("gradients", 0) == case.gradients
    assert tensors(memory) == 1000 + case.activations + case.gradients + memory.gpu["workspace"]


@dataclass(frozen=True)
class Fullest:
    name: str
    facts: dict[str, Any]
    expect: dict[str, int]
    """Terms of what is not always there."""
    plan: dict[str, Any] = field(default_factory=dict)


FULLEST = [
    Fullest(
        name="completions of a whole step",
        facts={"writing": [Moment(fixed=0, per_row=900, gradients=0)]},
        expect={"completions": 3600, "fragments": 540},
    ),
    Fullest(
        name="with DDP beside gradients, which stay",
        facts={"writing": [Moment(fixed=0, per_row=900, gradients=0)]},
        plan={"strategy": "ddp", "world_size": 2},
        expect={"gradients": 1000, "completions": 3600, "fragments": 540},
    ),
    Fullest(
        name="whole groups in an evaluation",
        facts={"evaluating": [Moment(fixed=100, per_row=400, gradients=0)]},
        expect={"evaluation": 1700, "fragments": 255},
    ),
    Fullest(
        name="a step that holds more than what is written",
        facts={"writing": [Moment(fixed=0, per_row=90, gradients=0)]},
        expect={"gradients": 1000, "activations": 200, "fragments": 30},
    ),
]


@pytest.mark.parametrize("case", FULLEST, ids=lambda case: case.name)
def test_the_fullest_moment_may_be_outside_of_a_step(case: Fullest) -> None:
    """Two completions in a forward pass, four in a step and in a group."""
    rewards = [{"type": "regex", "pattern": "a"}]
    spec = run(None, task="grpo", grpo={"generations": 4, "rewards": rewards}, training={"batchSize": 8}).spec
    given = {"strategy": "none", "micro_batch_size": 2, "accumulation_steps": 2}
    memory = peak(spec, Plan(**given | case.plan), facts(beside_bytes=70, **case.facts))
    assert memory.gpu["other models"] == 70
    parts = ("gradients", "activations", "update", "completions", "evaluation", "fragments")
    assert {name: memory.gpu[name] for name in parts if name in memory.gpu} == case.expect


def test_a_loss_by_chunks_has_other_lines_from_its_first_whole_chunk_on() -> None:
    few, many = (
        StepMemory(checkpointing=False, padded=False, rows=rows, kept_fixed=0, kept_per_row=0, moments=[moment])
        for rows, moment in (
            (1, Moment(fixed=0, per_row=100, gradients=0)),
            (8, Moment(fixed=720, per_row=10, gradients=0)),
        )
    )
    found = {}
    for rows in (7, 8, 64):
        plan = Plan(strategy="none", micro_batch_size=rows, accumulation_steps=2)
        found[rows] = peak(run(None).spec, plan, facts(steps=[few, many])).gpu["activations"]
    assert found == {7: 700, 8: 800, 64: 1360}


def test_without_gpus_all_of_it_is_in_the_memory_of_the_node() -> None:
    memory = peak(run(None, gpus=0).spec, Plan(strategy="none", micro_batch_size=16), facts())
    assert memory.gpu == {}
    assert memory.host_bytes - 1000 - 1600 < GIB


def test_offload_moves_states_from_the_gpus_to_the_node() -> None:
    spec, whole = run(None, method={"type": "full"}).spec, weights(SEVEN)
    given = without_model(spec, whole, "not computed")
    spread, offloaded = (
        peak(spec, Plan(strategy=strategy, world_size=8), given) for strategy in ("zero3", "zero3-offload")
    )
    moved = SEVEN * (2 + 2 + 4 + 8) / 8
    assert spread.gpu_bytes - offloaded.gpu_bytes == pytest.approx(moved, abs=8)
    assert offloaded.host_bytes > SEVEN * (2 + 4 + 4 + 8)


@dataclass(frozen=True)
class HostCase:
    """What the 8 processes of a pod hold beside their libraries and loaders, of a model of 7 B weights."""

    name: str
    held: int
    method: str = "full"
    strategy: str = "ddp"
    largest_unit: int = 500_000_000
    spec: dict[str, Any] = field(default_factory=dict)


FILE = gpu_memory.FILE_BYTES
HOST_CASES = [
    HostCase(name="files are larger than what is read at once", held=2 * FILE, largest_unit=10_000_000),
    HostCase(name="two parts are read by each process", held=8 * 2 * 500_000_000 * 4),
    HostCase(name="the frozen base is in 16 bits", held=8 * 2 * 500_000_000 * 2, method="lora"),
    HostCase(name="shards are read like that, too", held=8 * 2 * 500_000_000 * 4, strategy="zero3"),
    HostCase(name="never more than the model", held=8 * SEVEN * 4, largest_unit=SEVEN),
    HostCase(name="a model whose parts are not known", held=8 * SEVEN * 4, largest_unit=0),
    HostCase(name="diffusers loads all of it", held=8 * SEVEN * 2, method="lora", spec={"task": "text-to-image"}),
    HostCase(
        name="what is offloaded is there when a file is written",
        held=SEVEN * (4 + 4 + 8 + 2) + 2 * FILE,
        strategy="zero3-offload",
    ),
]


@pytest.mark.parametrize("case", HOST_CASES, ids=lambda case: case.name)
def test_no_process_of_a_gpu_holds_a_whole_model_on_the_host(case: HostCase) -> None:
    given = run(None, method={"type": case.method}, **case.spec)
    own = gpu_memory.PROCESS_BYTES["gpu"] + gpu_memory.LOADERS * gpu_memory.LOADER_BYTES
    found = without_model(given.spec, weights(SEVEN if case.method == "full" else LORA), "not computed")
    found = found.model_copy(update={"largest_unit": case.largest_unit})
    memory = peak(given.spec, Plan(strategy=case.strategy, world_size=8), found)
    assert memory.host_bytes - 8 * own == pytest.approx(case.held, abs=8)
