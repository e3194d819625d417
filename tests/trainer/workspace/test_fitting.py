"""Which layout is chosen for how much memory, and why; and what is said where none fits.

The figures are those of a model of 8 billion weights with rows of 4,096 tokens, about.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Compute, FineTuneRun, Gpu, MemoryFacts, Moment, PreparedRecord, StepMemory, Weights
from luthier_api.status import Memory, Plan, ResolvedDataset, ResolvedSource
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.prepare.training import with_present_plan
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.workspace import gpu_memory, layout, space
from luthier_trainer.workspace.fitting import fitted
from luthier_trainer.workspace.layout import Facts, strategies
from luthier_trainer.workspace.plan import plan_training

GB = 10**9
EIGHT, LORA = 8 * GB, 42_000_000
H100, A100_40, L4 = 80 * GB, 40 * GB, 24 * GB
CLASSES = {"l4": Gpu(memory=L4), "h100": Gpu(memory=H100), "h200": Gpu(memory=141 * GB)}


TRIED = ("zero2", "zero3", "zero2-offload", "zero3-offload")
CONTEXT = GB


def peak(spec: FineTuneJobSpec, plan: Plan, facts: MemoryFacts) -> Memory:
    """Return round figures, so that these cases stay when a term of the real sum (`test_gpu_memory`) changes."""
    stage = int(plan.strategy[4]) if plan.strategy.startswith("zero") else 0
    offloads, shares = "offload" in plan.strategy, plan.world_size if stage else 1
    weights = facts.total * 2 // (plan.world_size if stage == 3 else 1) if stage else facts.weight_bytes
    rows = {step.checkpointing: step.kept_per_row for step in facts.steps}
    per_row = rows.get(bool(plan.gradient_checkpointing), 0)
    activations = per_row * (plan.micro_batch_size or 1)
    terms = {
        "weights": 0 if stage == 3 and offloads else weights,
        "optimizer": 0 if offloads else (facts.state_bytes + facts.gradient_bytes) // shares,
        "context": CONTEXT,
        "activations": activations,
        "fragments": activations // 10,
    }
    host = facts.total * 2 + (facts.learning * 16 if offloads else 0)
    if not spec.resources.gpus_per_node:
        return Memory(host_bytes=host)
    terms = {name: size for name, size in terms.items() if size}
    return Memory(gpu=terms, gpu_bytes=sum(terms.values()), host_bytes=host)


@pytest.fixture(autouse=True)
def round_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_memory, "peak", peak)
    monkeypatch.setattr(layout, "SHARDED", TRIED)


def facts(learning: int = LORA, **changes: Any) -> Facts:
    adapters = learning < EIGHT
    weights = Weights(
        total=EIGHT,
        learning=learning,
        tensors=300,
        state_bytes=8 * learning,
        adapters=adapters,
        computed_bytes=2,
        source_bytes=2,
    )
    steps = [
        StepMemory(
            checkpointing=recomputed,
            padded=padded,
            kept_fixed=0,
            kept_per_row=per_row,
            kernels=10_000,
            moved_fixed=50 * GB,
            moved_per_row=(100 + 30 * recomputed) * GB,
            moments=[Moment(fixed=0, per_row=per_row, gradients=0)],
        )
        for recomputed, per_row in ((False, 30 * GB), (True, 4 * GB))
        for padded in (False, True)
    ]
    memory = MemoryFacts(
        total=EIGHT,
        learning=learning,
        state_bytes=8 * learning,
        computed_bytes=2,
        rest_bytes=2 if adapters else 4,
        weight_bytes=EIGHT * 2 + learning * 4 if adapters else EIGHT * 4,
        gradient_bytes=learning * 4,
        largest_unit=500_000_000,
        row_tokens=4096,
        steps=steps,
    )
    compute = Compute(
        multiplied=7_500_000_000,
        head=500_000_000,
        learning=learning,
        attention_width=32 * 4096,
        length=4096,
        units_a_row=4096,
    )
    missing = changes.pop("missing", None)
    if missing:
        memory = memory.model_copy(update={"steps": [], "missing": missing})
    found = Facts(memory, weights, compute)
    return Facts(**{**vars(found), **changes})


def run(memory: int | None, *, gpus: int = 1, nodes: int = 1, classes: bool = False, **spec: Any) -> FineTuneRun:
    training = {"batchSize": 32, "maxLength": 4096} | spec.pop("training", {})
    resources = {"gpusPerNode": gpus, "nodes": nodes} | spec.pop("resources", {})
    if memory is not None:
        resources |= {"gpuClass": "own"}
    base = {
        "task": "causal-lm",
        "model": {"id": "org/model"},
        "dataset": {"id": "org/chats"},
        "method": {"type": "lora"},
    }
    document = {
        "name": "bot",
        "workspace": "/w",
        "gpu": {"memory": memory, "peakFlops": 989e12} if memory else None,
        "gpuClasses": {name: gpu.dump() for name, gpu in CLASSES.items()} if classes else {},
        "spec": base | {"training": training, "resources": resources} | spec,
    }
    return FineTuneRun.model_validate(document)


def planned(given: FineTuneRun, known: Facts, kept: str | None = None) -> Plan:
    return fitted(given, plan_training(given.spec, 1000, EIGHT, known.cannot_recompute), known, kept)


FULL = {"method": {"type": "full"}}


@dataclass(frozen=True)
class Case:
    name: str
    memory: int | None
    expect: tuple[str, int, bool]
    """Strategy, rows of a forward pass, and whether activations are recomputed."""
    reasons: list[str]
    spec: dict[str, Any] = field(default_factory=dict)
    facts: Facts = field(default_factory=facts)
    kept: str | None = None


CASES = [
    Case(
        name="all activations fit",
        memory=H100,
        expect=("none", 1, False),
        reasons=[
            "microBatchSize: 1, which takes 50.7 GB of each GPU, which has 80.0 GB; 2 would take 83.7 GB",
            "gradientCheckpointing: false, with which a step takes about 23% less time",
        ],
    ),
    Case(
        name="activations are recomputed",
        memory=A100_40,
        expect=("none", 2, True),
        reasons=[
            "microBatchSize: 2, which takes 26.5 GB of each GPU, which has 40.0 GB. More rows make a step hardly"
            " faster",
            "gradientCheckpointing: true, because without it a step needs at least 50.7 GB of each GPU,"
            " which has 40.0 GB",
        ],
    ),
    Case(
        name="several GPUs",
        memory=L4,
        spec={"gpus": 8},
        expect=("ddp", 1, True),
        reasons=[
            "microBatchSize: 1, which takes 22.1 GB of each GPU, which has 24.0 GB; 2 would take 26.5 GB",
            "gradientCheckpointing: true, because without it a step needs at least 50.7 GB of each GPU,"
            " which has 24.0 GB",
        ],
    ),
    Case(
        name="optimiser and gradients are divided",
        memory=H100,
        spec=FULL | {"gpus": 8},
        facts=facts(EIGHT),
        expect=("zero2", 4, True),
        reasons=[
            "strategy: zero2, because ddp needs at least 133.4 GB of each GPU, which has 80.0 GB",
            "microBatchSize: 4, which takes 46.6 GB of each GPU, which has 80.0 GB",
            "gradientCheckpointing: true, with which a step takes about 6% less time",
        ],
    ),
    Case(
        name="one GPU and the memory of its node",
        memory=H100,
        spec=FULL,
        facts=facts(EIGHT),
        expect=("zero2-offload", 1, False),
        reasons=[
            "strategy: zero2-offload, because without it a step needs at least 133.4 GB of each GPU, which has 80.0 GB",
            "microBatchSize: 1, which takes 50.0 GB of each GPU, which has 80.0 GB; 2 would take 83.0 GB",
            "gradientCheckpointing: false, with which a step takes about 6% less time",
        ],
    ),
    Case(
        name="weights rest in the memory of the node",
        memory=16 * GB,
        spec=FULL | {"gpus": 8},
        facts=facts(EIGHT),
        expect=("zero3-offload", 2, True),
        reasons=[
            "strategy: zero3-offload, because ddp needs at least 133.4 GB of each GPU, which has 16.0 GB",
            "microBatchSize: 2, which takes 9.8 GB of each GPU, which has 16.0 GB; 4 would take 18.6 GB",
            "gradientCheckpointing: true, because without it a step needs at least 34.0 GB of each GPU,"
            " which has 16.0 GB",
        ],
    ),
    Case(
        name="what the user has set stays",
        memory=H100,
        spec={"training": {"microBatchSize": 8}, "gpus": 2, "strategy": "zero2"},
        expect=("zero2", 8, True),
        reasons=[
            "gradientCheckpointing: true, because without it a step needs at least 281.3 GB of each GPU,"
            " which has 80.0 GB",
        ],
    ),
    Case(
        name="nothing is left open",
        memory=H100,
        spec={"training": {"microBatchSize": 2, "gradientCheckpointing": True}, "gpus": 2, "strategy": "ddp"},
        expect=("ddp", 2, True),
        reasons=[],
    ),
    Case(
        name="the user knows the memory",
        memory=None,
        spec={"resources": {"gpuMemory": "24Gi"}},
        expect=("none", 1, True),
        reasons=[
            "microBatchSize: 1, which takes 22.1 GB of each GPU, which has 25.8 GB; 2 would take 26.5 GB",
            "gradientCheckpointing: true, because without it a step needs at least 50.7 GB of each GPU,"
            " which has 25.8 GB",
        ],
    ),
    Case(
        name="nobody knows the memory",
        memory=None,
        expect=("none", 1, True),
        reasons=[
            "microBatchSize: 1, because rows of 4096 tokens are large for a GPU. Set it higher if yours has"
            " memory left",
            "gradientCheckpointing: true, the default on GPUs. Set it to false if yours have memory left: a"
            " step takes about a quarter less time",
            "The memory of the GPUs is not known, so these are limits that fit most of them. Name their"
            " class (resources.gpuClass) or set resources.gpuMemory, and the fastest layout that fits is"
            " chosen",
        ],
    ),
    Case(
        name="only without the gaps of the allocator",
        memory=22 * GB,
        spec={"strategy": "ddp"},
        expect=("ddp", 1, True),
        reasons=[
            "microBatchSize: 1, which takes 22.1 GB of each GPU, which has 22.0 GB; 2 would take 26.5 GB",
            "gradientCheckpointing: true, because without it a step needs at least 50.7 GB of each GPU,"
            " which has 22.0 GB",
            "memory: 22.1 GB with the gaps that torch's allocator usually leaves, more than the 22.0 GB of"
            " each GPU: it may run out",
        ],
    ),
    Case(
        name="a model that cannot recompute",
        memory=H100,
        facts=facts(cannot_recompute="resnet cannot recompute its activations"),
        expect=("none", 1, False),
        reasons=[
            "microBatchSize: 1, which takes 50.7 GB of each GPU, which has 80.0 GB; 2 would take 83.7 GB",
        ],
    ),
    Case(
        name="a step that was not computed",
        memory=H100,
        facts=facts(missing="a step of reward is not computed"),
        expect=("none", 1, True),
        reasons=[
            "microBatchSize: 1, because rows of 4096 tokens are large for a GPU. Set it higher if yours has"
            " memory left",
            "gradientCheckpointing: true, the default on GPUs. Set it to false if yours have memory left: a"
            " step takes about a quarter less time",
        ],
    ),
    Case(
        name="the own memory of the pod",
        memory=H100,
        spec={"resources": {"memory": "16Gi"}},
        expect=("none", 1, False),
        reasons=[
            "microBatchSize: 1, which takes 50.7 GB of each GPU, which has 80.0 GB; 2 would take 83.7 GB",
            "gradientCheckpointing: false, with which a step takes about 23% less time",
        ],
    ),
    Case(
        name="checkpoints of another strategy",
        memory=H100,
        spec=FULL | {"gpus": 8},
        facts=facts(EIGHT),
        kept="zero3",
        expect=("zero3", 4, True),
        reasons=[
            "strategy: zero3, with which the checkpoints in the workspace were saved",
            "microBatchSize: 4, which takes 32.6 GB of each GPU, which has 80.0 GB",
            "gradientCheckpointing: true, with which a step takes about 29% less time",
        ],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_fastest_layout_that_fits(case: Case) -> None:
    plan = planned(run(case.memory, **case.spec), case.facts, case.kept)
    found = (plan.strategy, plan.micro_batch_size, plan.gradient_checkpointing)
    assert (found, plan.reasons) == (case.expect, case.reasons)
    assert plan.memory is not None
    rows = (plan.micro_batch_size or 0) * (plan.accumulation_steps or 0) * plan.world_size
    assert rows == 32


@dataclass(frozen=True)
class FixedCase:
    name: str
    weights: dict[str, Any]
    spec: dict[str, Any]


FIXED = [
    FixedCase(name="batch statistics", weights={"normalizes_over_batch": True}, spec={}),
    FixedCase(
        name="KTO compares answers",
        weights={},
        spec={"task": "preference", "preference": {"lossType": "kto"}},
    ),
    FixedCase(
        name="an embedding is told from those beside it",
        weights={},
        spec={"task": "embedding", "training": {"batchSize": 8}},
    ),
]


@pytest.mark.parametrize("case", FIXED, ids=lambda case: case.name)
def test_rows_of_a_forward_pass_that_decide_the_result_stay(case: FixedCase) -> None:
    known = facts()
    known = facts(weights=known.weights.model_copy(update=case.weights))
    given = run(A100_40, **{"training": {"maxLength": 512}} | case.spec)
    safe = plan_training(given.spec, 1000, EIGHT)
    assert fitted(given, safe, known).micro_batch_size == safe.micro_batch_size != 1


def test_strategies_are_those_that_the_api_allows() -> None:
    known = facts(EIGHT)
    plan = plan_training(run(H100, gpus=8).spec, 1000, EIGHT)
    everything = strategies(run(H100, gpus=8, **FULL).spec, plan, known)
    assert everything == ["ddp", *TRIED]
    assert strategies(run(H100, gpus=8, method={"type": "qlora"}).spec, plan, known) == [
        name for name in everything if not name.startswith("zero3")
    ]
    eight_bits = {"optimizer": "adamw_8bit"}
    assert strategies(run(H100, gpus=8, training=eight_bits).spec, plan, known) == ["ddp"]


@dataclass(frozen=True)
class RefusedCase:
    name: str
    memory: int | None
    message: str
    spec: dict[str, Any] = field(default_factory=dict)
    facts: Facts = field(default_factory=facts)


REFUSED = [
    RefusedCase(
        name="a strategy that the user has set",
        memory=H100,
        spec=FULL | {"gpus": 8, "strategy": "ddp", "classes": True},
        facts=facts(EIGHT),
        message=(
            "spec.resources.gpuClass: the training takes at least 133.0 GB of each GPU (optimizer 96.0 GB,"
            " weights 32.0 GB, activations 4.0 GB), and one of class own has 80.0 GB. What would fit, with"
            " the same result: strategy: zero2 (46.6 GB); gpuClass: h200 (137.8 GB of 141.0 GB)"
        ),
    ),
    RefusedCase(
        name="rows and recomputing that the user has set",
        memory=H100,
        spec={"training": {"microBatchSize": 8, "gradientCheckpointing": False}, "strategy": "ddp", "classes": True},
        message=(
            "spec.resources.gpuClass: the training takes at least 257.7 GB of each GPU (activations 240.0"
            " GB, weights 16.2 GB, context 1.0 GB), and one of class own has 80.0 GB. What would fit, with"
            " the same result: training.microBatchSize: 1 (50.7 GB); training.gradientCheckpointing: true"
            " (52.9 GB)"
        ),
    ),
    RefusedCase(
        name="more GPUs, or larger ones",
        memory=L4,
        spec=FULL | {"training": {"optimizer": "adamw_8bit"}, "classes": True},
        facts=facts(EIGHT),
        message=(
            "spec.resources.gpuClass: the training takes at least 133.0 GB of each GPU (optimizer 96.0 GB,"
            " weights 32.0 GB, activations 4.0 GB), and one of class own has 24.0 GB. What would fit, with"
            " the same result: gpuClass: h200 (137.8 GB of 141.0 GB)"
        ),
    ),
    RefusedCase(
        name="frozen weights that no GPU holds whole",
        memory=4 * GB,
        spec={"classes": True, "method": {"type": "lora"}},
        message=(
            "spec.resources.gpuClass: the training takes at least 5.0 GB of each GPU (activations 4.0 GB,"
            " context 1.0 GB), and one of class own has 4.0 GB. What would fit, with the same result:"
            " gpuClass: l4 (22.1 GB of 24.0 GB)"
        ),
    ),
    RefusedCase(
        name="a pod without GPUs",
        memory=None,
        spec={"gpus": 0, "resources": {"memory": "8Gi"}},
        message=(
            "spec.resources.memory: the training takes at least 16.0 GB of the pod, and its limit is 8.6 GB."
            " What would fit, with the same result: resources.memory: 15Gi"
        ),
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_does_not_fit_says_what_would(case: RefusedCase) -> None:
    with pytest.raises(Failure) as refused:
        planned(run(case.memory, **case.spec), case.facts)
    assert refused.value.code == ExitCode.DOES_NOT_FIT
    assert refused.value.message == case.message


def test_what_changes_the_result_is_the_last_resort() -> None:
    """Nothing else fits: the model has no smaller layout, and there is no larger class."""

    def other(spec: FineTuneJobSpec) -> Facts:
        known = facts()
        factor = (spec.training.max_length or 0) / 4096 / (2 if spec.method.type == "qlora" else 1)
        resting = GB if spec.method.type == "qlora" else known.memory.weight_bytes
        steps = [step.model_copy(update={"kept_per_row": int(10 * GB * factor)}) for step in known.memory.steps]
        return facts(memory=known.memory.model_copy(update={"steps": steps, "weight_bytes": resting}))

    given = run(10_500_000_000)
    known = other(given.spec)
    with pytest.raises(Failure) as refused:
        fitted(given, plan_training(given.spec, 1000, EIGHT), known, other=other)
    assert refused.value.message == (
        "spec.resources.gpuClass: the training takes at least 11.0 GB of each GPU (activations 10.0 GB,"
        " context 1.0 GB), and one of class own has 10.5 GB. What would fit, but changes what is learnt:"
        " method.type: qlora (8.0 GB); training.maxLength: 2048 (6.5 GB)"
    )


def test_fewer_rows_that_are_compared_change_the_result() -> None:
    given = run(A100_40, task="embedding")
    with pytest.raises(Failure) as refused:
        fitted(given, plan_training(given.spec, 1000, EIGHT), facts(), other=lambda _: facts())
    assert refused.value.message == (
        "spec.resources.gpuClass: the training takes at least 129.0 GB of each GPU (activations 128.0 GB,"
        " context 1.0 GB), and one of class own has 40.0 GB. What would fit, but changes what is learnt:"
        " training.microBatchSize: 8 (36.2 GB)"
    )


@pytest.mark.parametrize(("saved", "expect"), [(True, "zero3"), (False, "zero2")])
def test_a_training_resumes_with_the_strategy_of_its_checkpoints(
    saved: bool, expect: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another class of GPUs, too: a checkpoint of another strategy could not be read."""
    given = run(H100, gpus=8, **FULL).model_copy(update={"workspace": str(tmp_path)})
    folder, known = WorkspaceFolder(tmp_path), facts(EIGHT)
    folder.prepared.mkdir(parents=True)
    if saved:
        (folder.checkpoints / "checkpoint-5").mkdir(parents=True)
    record = PreparedRecord(
        model=ResolvedSource(source="org/model"),
        dataset=ResolvedDataset(source="org/chats", rows=1000),
        plan=Plan(strategy="zero3", world_size=8, parameters=EIGHT),
        model_path="/model",
        dataset_path="/dataset",
        weights=known.weights,
        memory_facts=known.memory,
        compute=known.compute,
    )
    monkeypatch.setattr(space, "volume", lambda folder: (10**13, 10**13))  # a volume that is large enough
    plan = with_present_plan(given, record, folder).plan
    assert plan.strategy == expect
    assert plan.gpu_hours
