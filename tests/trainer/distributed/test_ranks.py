"""Several processes, started as in pods: they train one model together, stop together, and go on where they stopped.

Each start costs every process seven seconds of imports. So two processes of one strategy train whatever is asked of it,
one run after another, and each test looks at one of these runs.
"""

from __future__ import annotations

import functools
import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, load_from_disk
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import AutoPeftModelForCausalLM
from prepared_workspace import (
    classification_data,
    image_data,
    losses,
    packed_data,
    pod,
    prepared_run,
    prose,
    save_encoder,
)
from safetensors.torch import load_file
from trainer.digits import RESNET
from trainer.digits import save_model as save_images_model
from trainer.distributed import courses, one_after_another
from trainer.distributed.courses import COURSES, Course
from trainer.distributed.groups import TIMEOUT, Group, free_port
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from luthier_api.run import FineTuneRun
from luthier_api.termination import TerminationMessage
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.methods import trainable
from luthier_trainer.prepare import main as prepare
from luthier_trainer.training import main as train
from luthier_trainer.workspace import space
from luthier_trainer.workspace.prepared import read_prepared

# The groups of runs take minutes, and DeepSpeed compiles its collectives first.
pytestmark = pytest.mark.slow

LORA = {"type": "lora", "rank": 4}
FULL = {"type": "full"}
TRAINING = {"maxSteps": 6, "learningRate": 1e-2}


@pytest.fixture(scope="module")
def data(llama: Path, paragraphs: list[str]) -> DatasetDict:
    """Row counts that no number of processes divides: of nine rows, the last step of an epoch has one, on one process
    of two. Each row has several texts, of which a part is learnt, so that the processes have different numbers of
    labels.
    """
    return packed_data(AutoTokenizer.from_pretrained(llama), prose(paragraphs), 9)


@pytest.fixture(scope="module")
def alone(
    llama: Path, data: DatasetDict, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[float], dict[str, float]]:
    """The losses and figures of one process with the whole batch: what any number of processes must come to."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUN_DIR", str(folder))
        run = prepared_run(folder / "job", llama, data, method=LORA, training=TRAINING)
        metrics = train.main(run).metrics
    assert metrics is not None
    return losses(run), metrics


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Group]:
    """A group whose runs are made by these functions, of the folder of a run."""

    def make(**runs: Callable[[Path], FineTuneRun]) -> Group:
        folder = tmp_path_factory.mktemp("group")
        return Group(folder, {name: of(folder / name) for name, of in runs.items()})

    return make


def make(root: Path, llama: Path, data: DatasetDict, **spec: Any) -> FineTuneRun:
    return prepared_run(root / "job", llama, data, port=free_port(), **({"method": LORA, "training": TRAINING} | spec))


def finish(run: FineTuneRun, folder: Path, nodes: int = 1) -> list[TerminationMessage]:
    """Start all pods of the run, wait for them, and return the message of each rank."""
    with ExitStack() as pods:
        processes = [pods.enter_context(pod(run, folder / f"pod-{node}", node)) for node in range(nodes)]
        codes = [process.wait(TIMEOUT) for process in processes]
    return messages(folder, codes)


def messages(folder: Path, codes: list[int]) -> list[TerminationMessage]:
    assert codes == [0] * len(codes), "\n".join(log.read_text()[-3000:] for log in folder.glob("pod-*/log"))
    files = sorted(folder.glob("pod-*/result-*.json"), key=lambda p: p.name)
    return [TerminationMessage.model_validate_json(file.read_bytes()) for file in files]


@dataclass(frozen=True)
class Case:
    """A classifier, which two processes train as one process does."""

    name: str
    inputs: str
    strategy: str
    labels: list[str]  # for which the head of the base was made
    training: dict[str, Any] = field(default_factory=dict)


CLASSIFIERS = [
    Case(
        name="text-ddp",
        inputs="text",
        strategy="ddp",
        labels=["a", "b"],
        training={"labelSmoothing": 0.2},
    ),
    Case(
        name="text-zero3-other-labels",
        inputs="text",
        strategy="zero3",
        labels=["x", "y", "z"],
    ),
    # whose rows are spread over the processes when they have to change places
    Case(
        name="text-zero3-another-order",
        inputs="text",
        strategy="zero3",
        labels=["b", "a"],
    ),
    Case(
        name="text-fsdp-other-labels",
        inputs="text",
        strategy="fsdp",
        labels=["x", "y", "z"],
        training={"gradientCheckpointing": True},
    ),
    Case(
        name="image-ddp-another-order",
        inputs="image",
        strategy="ddp",
        labels=["b", "a"],
    ),
    Case(
        name="image-zero2",
        inputs="image",
        strategy="zero2",
        labels=["a", "b"],
    ),
]
CLASSIFIER_TRAINING = TRAINING | {"learningRate": 1e-3}


@pytest.fixture(scope="module")
def classifiers(
    llama: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Callable[[Path], FineTuneRun]]]:
    """What makes the classifiers of a strategy, by name. Beside each run its base is in `base`, and in `alone` the
    workspace of the same training for one process.
    """

    def make(case: Case, root: Path) -> FineTuneRun:
        if case.inputs == "image":
            base, rows, auto = save_images_model(root / "base"), image_data(), AutoModelForImageClassification
        else:
            tokenizer = AutoTokenizer.from_pretrained(llama)
            base, rows = save_encoder(root / "base", tokenizer), classification_data(tokenizer, paragraphs)
            auto = AutoModelForSequenceClassification
        # Three steps an epoch. In the last, of its two micro-batches one process has two rows and one, the other two
        # and none.
        rows = DatasetDict(train=rows["train"].select(range(21)), eval=rows["eval"])
        auto.from_pretrained(base, id2label=dict(enumerate(case.labels))).save_pretrained(base)
        spec: dict[str, Any] = {
            "task": f"{case.inputs}-classification",
            "labels": ["a", "b"],
            "method": {"type": "full"},
            "training": CLASSIFIER_TRAINING | case.training,
        }
        alone = prepared_run(root / "alone", base, rows, **spec)
        (root / "alone.json").write_text(json.dumps(alone.dump()))
        training = CLASSIFIER_TRAINING | case.training | {"microBatchSize": 2}
        return two(root, base, rows, strategy=case.strategy, **spec | {"training": training})

    return lambda strategy: {
        case.name: functools.partial(make, case) for case in CLASSIFIERS if case.strategy == strategy
    }


def two(root: Path, llama: Path, data: DatasetDict, **spec: Any) -> FineTuneRun:
    """A run for two processes of one pod."""
    return make(root, llama, data, resources={"processesPerNode": 2}, **spec)


PREFERENCE: dict[str, Any] = {
    "task": "preference",
    "method": LORA,
    "training": {
        "maxLength": 48,
        "batchSize": 4,
        "microBatchSize": 2,
        "maxSteps": 6,
        "learningRate": 1e-3,
        "logSteps": 1,
        "evalSteps": 3,
    },
}


KTO: dict[str, Any] = {"preference": {"lossType": "kto"}}
RATED: dict[str, Any] = {"task": "reward", "training": PREFERENCE["training"] | {"maxLength": 96}}
REWARDED: dict[str, Any] = {
    "task": "grpo",
    "method": LORA,
    "grpo": {"generations": 4, "maxCompletionLength": 6, "beta": 0.1, "rewards": [{"type": "length", "tokens": 3}]},
    # The completions of a prompt are spread over both processes and two micro-batches.
    "training": PREFERENCE["training"]
    | {"maxLength": 96, "batchSize": 8, "maxSteps": 3, "learningRate": 1e-2, "evalSteps": 2},
}
REWARD_FIGURES = ("evalLoss", "reward", "kl", "completionLength", "trainReward")


def paired(
    root: Path,
    model: Path,
    pairs: list[dict[str, str]],
    strategy: str,
    evaluated: bool = True,
    fixed: bool = False,
    **changes: Any,
) -> FineTuneRun:
    """Of 9 pairs in steps of 4 and micro-batches of 2, the last step of an epoch has one pair: one process has none of
    its own, and all pairs count alike. The same training for one process is in `root`/alone.json.
    """
    root.mkdir()
    files = {"files": pairs[:9], "evalFiles": pairs[-8:]}
    for name, rows in files.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = (
        PREFERENCE
        | changes
        | {
            "model": {"path": str(model)},
            "dataset": {name: [str(root / f"{name}.jsonl")] for name in files},
            "resources": {"gpusPerNode": 0},
        }
    )
    alone = FineTuneRun.model_validate(
        {"name": "alone", "workspace": str(root / "alone"), "metricsPort": 0, "spec": spec}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LUTHIER_RUN_DIR", str(root))
        prepare.main(alone)
    (root / "alone.json").write_text(json.dumps(alone.dump()))
    data = DatasetDict(load_from_disk(read_prepared(alone).dataset_path))
    if not evaluated:
        del data["eval"]
    if fixed:
        (root / one_after_another.FIXED).touch()
    return two(root, model, data, strategy=strategy, **PREFERENCE | changes)


@dataclass(frozen=True)
class Preferring:
    name: str
    strategy: str
    changes: dict[str, Any] = field(default_factory=dict)
    same_steps: int | None = None
    """Steps that are those of one process; None: all. KTO compares the rows of a micro-batch, which are others."""
    quantised: bool = False
    """Whether the base is one that bitsandbytes can quantise."""
    figures: tuple[str, ...] = ("evalLoss", "rewardAccuracy", "rewardMargin")
    """Metrics that are those of one process."""
    fixed: bool = False
    """Whether completions follow from their prompts: what is sampled depends on the number of processes."""
    tolerance: float = 1e-5
    stopped: bool = False
    """Whether the same run is also stopped after its first step, and resumed."""


PREFERRING = [
    Preferring(name="prefer_adapter", strategy="ddp"),
    Preferring(
        name="prefer_kept",
        strategy="ddp",
        changes={"method": FULL, "preference": {"precomputeReference": True}},
    ),
    Preferring(
        name="prefer_quantised",
        strategy="ddp",
        changes={"method": {"type": "qlora", "rank": 4}},
        quantised=True,
    ),
    Preferring(name="prefer_rated", strategy="ddp", changes=KTO, same_steps=1, figures=(), stopped=True),
    Preferring(name="reward", strategy="ddp", changes=RATED, stopped=True),
    Preferring(name="grpo", strategy="ddp", changes=REWARDED, same_steps=0, figures=(), stopped=True),
    Preferring(name="grpo_fixed", strategy="ddp", changes=REWARDED, figures=REWARD_FIGURES, fixed=True),
    Preferring(name="prefer_adapter_zero2", strategy="zero2"),
    Preferring(name="prefer_all_zero2", strategy="zero2", changes={"method": FULL}),
    Preferring(name="prefer_kept_zero2", strategy="zero2", changes={"preference": {"precomputeReference": True}}),
    # DeepSpeed's AdamW rounds in another way, and the products with quantised weights are in bf16.
    Preferring(
        name="prefer_quantised_zero2",
        tolerance=2e-4,
        strategy="zero2",
        changes={"method": {"type": "qlora", "rank": 4}},
        quantised=True,
        stopped=True,
    ),
    Preferring(name="prefer_rated_zero2", strategy="zero2", changes=KTO, same_steps=1, figures=(), stopped=True),
    Preferring(name="reward_zero2", strategy="zero2", changes=RATED, stopped=True),
    Preferring(name="reward_all_zero2", strategy="zero2", changes=RATED | {"method": FULL}),
    Preferring(name="grpo_zero2", strategy="zero2", changes=REWARDED, same_steps=0, figures=(), stopped=True),
    Preferring(
        name="grpo_fixed_zero2",
        strategy="zero2",
        changes=REWARDED | {"method": FULL},
        figures=REWARD_FIGURES,
        fixed=True,
    ),
]


def preferences(
    models: dict[bool, Path], pairs: list[dict[str, str]], strategy: str
) -> dict[str, Callable[[Path], FineTuneRun]]:
    """What makes the runs of `PREFERRING`, by name. `models`: whether it can be quantised → the base."""
    found: dict[str, Callable[[Path], FineTuneRun]] = {}
    for case in PREFERRING:
        if case.strategy != strategy:
            continue
        of = functools.partial(
            paired, model=models[case.quantised], pairs=pairs, strategy=strategy, fixed=case.fixed, **case.changes
        )
        found[case.name] = of
        if case.stopped:
            found |= stopped_and_resumed(case.name, of)
    return found


def stopped_and_resumed(name: str, of: Callable[..., FineTuneRun]) -> dict[str, Callable[[Path], FineTuneRun]]:
    """The same run twice: it is told to stop from the beginning, which it does after its first step, and goes on.

    It has no rows to evaluate on, because it would leave the evaluation before its first step.
    """
    made: list[FineTuneRun] = []

    def stopped(root: Path) -> FineTuneRun:
        made.append(of(root, evaluated=False))
        (root / "stop").touch()
        return made[0]

    def resumed(root: Path) -> FineTuneRun:
        root.mkdir()
        return made[0]

    return {f"{name}_stopped": stopped, f"{name}_resumed": resumed}


def streams(model: Path) -> dict[str, Callable[[Path], FineTuneRun]]:
    """A run whose rows are read while it learns; the same one that is stopped in its first step; and that one again.

    The position in its checkpoint is within a block of rows that are shuffled with each other.
    """
    made: dict[str, FineTuneRun] = {}

    def begin(root: Path) -> FineTuneRun:
        root.mkdir()
        rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}" * (i % 5)} for i in range(50)]
        for name in ("0", "1"):
            (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[int(name) :: 2]))
        spec = {
            "task": "causal-lm",
            "model": {"path": str(model)},
            "dataset": {"files": [str(root / "0.jsonl"), str(root / "1.jsonl")], "streaming": True, "shuffleBuffer": 7},
            "method": LORA,
            "training": TRAINING | {"maxSteps": 9, "maxLength": 48, "batchSize": 8, "microBatchSize": 2, "logSteps": 1},
        }
        for processes, name in ((1, "alone"), (2, "job")):
            run = FineTuneRun.model_validate(
                {
                    "name": name,
                    "workspace": str(root / name),
                    "metricsPort": 0,
                    "rendezvousPort": free_port(),
                    "spec": spec | {"resources": {"gpusPerNode": 0, "processesPerNode": processes}},
                }
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LUTHIER_RUN_DIR", str(root))
                prepare.main(run)
            (root / f"{name}.json").write_text(json.dumps(run.dump()))
        return run

    def stop(root: Path) -> FineTuneRun:
        made["stopped"] = begin(root)
        (root / "stop").touch()
        return made["stopped"]

    def go_on(root: Path) -> FineTuneRun:
        root.mkdir()
        return made["stopped"]

    return {"stream": begin, "stream_stopped": stop, "stream_resumed": go_on}


def of_courses(model: Path, data: DatasetDict, strategy: str) -> dict[str, Any]:
    """What makes the runs of the courses, by name. Whole models are written in several files."""

    def make(root: Path, course: Course) -> FineTuneRun:
        resources = {"processesPerNode": 2}
        run = courses.runs(root / "job", course, model, data, strategy, port=free_port(), resources=resources)
        (root / one_after_another.SMALL_FILES).touch()
        return run

    return {course.name: functools.partial(make, course=course) for course in COURSES if strategy in course.strategies}


def batch_norm(root: Path) -> FineTuneRun:
    """A ResNet: each process has statistics of its own batches."""
    base, rows = save_images_model(root / "base", RESNET), image_data()
    spec = {"task": "image-classification", "labels": ["a", "b"], "method": {"type": "full"}}
    return two(root, base, rows, training={"maxSteps": 4}, **spec)


def of_fsdp(model: Path, data: DatasetDict) -> dict[str, Callable[[Path], FineTuneRun]]:
    """An adapter; and all weights, of 8 rows that are a step, with as many numbers of labels in each of its passes.

    The best weights are delivered, which are not the last ones. The same again is stopped, and resumed. FSDP is refused
    on CPUs by the rules of the API: these runs have not been through them.
    """

    def whole(root: Path, evaluated: bool = True, **training: Any) -> FineTuneRun:
        rows = DatasetDict(train=data["train"].select(range(8)))
        if evaluated:
            rows["eval"] = data["eval"].map(courses.unlike)
        own = {"maxSteps": 6, "schedule": "constant", "learningRate": 1e-2, "optimizerOptions": {"epsilon": 1e-3}}
        training = own | {"microBatchSize": 2, "saveSteps": 2} | training
        return two(root, model, rows, strategy="fsdp", method=FULL, training=training)

    def adapter(root: Path) -> FineTuneRun:
        return two(root, model, data, strategy="fsdp", training=TRAINING | {"gradientCheckpointing": True})

    return {
        "fsdp_adapter": adapter,
        "fsdp_whole": whole,
        "fsdp_best": functools.partial(whole, loadBestModel=True, evalSteps=2),
        "fsdp_unevaluated": functools.partial(whole, evaluated=False),
        **stopped_and_resumed("fsdp_whole", whole),
    }


@pytest.fixture(scope="module")
def ddp(
    group: Any, classifiers: Any, llama: Path, data: DatasetDict, tiny_model: Path, pairs: list[dict[str, str]]
) -> Group:
    made: Group = group(
        adapter=lambda root: two(root, llama, data),
        **preferences({False: tiny_model, True: llama}, pairs, "ddp"),
        batch_norm=batch_norm,
        **streams(tiny_model),
        **classifiers("ddp"),
        **of_fsdp(llama, data),
        **classifiers("fsdp"),
        **of_courses(llama, data, "ddp"),
    )
    made.train_all()
    return made


ONE_STEP = TRAINING | {"maxSteps": 1}


@pytest.fixture(scope="module")
def with_own_output(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose configuration ties the output layer to the embedding, while its files hold two that differ."""
    folder = tmp_path_factory.mktemp("own-output")
    shutil.copytree(llama, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    return folder


@dataclass(frozen=True)
class Shards:
    """A model whose weights are in files, and in the shards of two processes."""

    name: str
    sizes: dict[str, Any]
    """What its configuration has beside that of the Llama of the other tests."""
    kind: str = "llama"
    dtype: str = "float32"
    """Of the files."""
    precision: str = "fp32"
    method: dict[str, Any] = field(default_factory=lambda: LORA)

    def write(self, folder: Path, llama: Path) -> Path:
        config = AutoConfig.from_pretrained(llama).to_dict() | self.sizes
        config = AutoConfig.for_model(**{**config, "model_type": self.kind})
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, self.dtype))
        model.save_pretrained(folder, max_shard_size="100KB")
        AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
        return folder

    def run(self, root: Path, llama: Path, data: DatasetDict) -> FineTuneRun:
        root.mkdir()
        (root / one_after_another.LOADED).touch()
        training = ONE_STEP | {"precision": self.precision}
        model = self.write(root / "model", llama)
        return two(root, model, data, strategy="zero3", method=self.method, training=training)


ODD = {"hidden_size": 65, "intermediate_size": 129, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARDS = [
    Shards(name="an adapter", sizes={}),
    Shards(name="all weights", sizes={}, method=FULL),
    Shards(name="tied weights", sizes={"tie_word_embeddings": True}),
    Shards(name="tied weights that learn", sizes={"tie_word_embeddings": True}, method=FULL),
    Shards(name="files in bf16", sizes={}, dtype="bfloat16", precision="bf16"),
    Shards(name="files in fp32, for bf16", sizes={}, precision="bf16", method=FULL),
    Shards(name="numbers that two does not divide", sizes=ODD, method=FULL),
    Shards(name="experts, which files hold one by one", sizes=EXPERTS, kind="mixtral", method=FULL),
]


@pytest.fixture(scope="module")
def zero3(
    group: Any, classifiers: Any, deepspeed_operators: None, llama: Path, with_own_output: Path, data: DatasetDict
) -> Group:
    """The adapter with recomputed activations, as is the default on GPUs: weights are gathered once more for them."""
    training = TRAINING | {"gradientCheckpointing": True}
    made: Group = group(
        adapter=lambda root: two(root, llama, data, strategy="zero3", training=training),
        **{"own-output": lambda root: two(root, with_own_output, data, strategy="zero3", training=ONE_STEP)},
        **{case.name: functools.partial(case.run, llama=llama, data=data) for case in SHARDS},
        **classifiers("zero3"),
        **of_courses(llama, data, "zero3"),
    )
    made.train_all()
    return made


@pytest.fixture(scope="module")
def zero1(group: Any, deepspeed_operators: None, llama: Path, data: DatasetDict) -> Group:
    """An adapter, and all weights, which are stopped in their first step and resumed, too."""

    def whole(root: Path, evaluated: bool = True) -> FineTuneRun:
        rows = data if evaluated else DatasetDict(train=data["train"])
        return two(root, llama, rows, strategy="zero1", method=FULL, training=TRAINING | {"learningRate": 1e-3})

    made: Group = group(
        adapter=lambda root: two(root, llama, data, strategy="zero1"),
        whole=whole,
        **stopped_and_resumed("whole", whole),
    )
    made.train_all()
    return made


MICRO_BATCHES = {"as-before": 4, "with-half-the-micro-batch": 2}
"""Of the runs that are resumed with DeepSpeed. With half of it, as after CUDA has run out of memory."""


@pytest.fixture(scope="module")
def zero2(
    group: Any,
    classifiers: Any,
    deepspeed_operators: None,
    llama: Path,
    data: DatasetDict,
    tiny_model: Path,
    pairs: list[dict[str, str]],
) -> Group:
    """Adapters that are stopped in their first step, beside the classifiers.

    Without rows to evaluate on: a run that is to stop from the beginning would leave the evaluation before its first
    step.
    """
    rows = DatasetDict(train=data["train"])
    made: Group = group(
        **{name: lambda root: two(root, llama, rows, strategy="zero2") for name in MICRO_BATCHES},
        **classifiers("zero2"),
        **of_courses(llama, data, "zero2"),
        **preferences({False: tiny_model, True: llama}, pairs, "zero2"),
    )
    for name in MICRO_BATCHES:
        (made.folder / name / "stop").touch()
    made.train_all()
    return made


@pytest.fixture(scope="module")
def resumed(zero2: Group, group: Any) -> Group:
    """The adapters of `zero2`, resumed by other processes."""

    def resume(name: str, root: Path) -> FineTuneRun:
        run = zero2.runs[name]
        training = run.spec.training.model_copy(update={"micro_batch_size": MICRO_BATCHES[name]})
        root.mkdir()
        return run.model_copy(update={"spec": run.spec.model_copy(update={"training": training})})

    made: Group = group(**{name: functools.partial(resume, name) for name in MICRO_BATCHES})
    made.train_all()
    return made


def test_two_processes_are_one(ddp: Group, alone: Any) -> None:
    ended = ddp.ends("adapter")
    assert [(m.code, m.rank) for m in ended] == [(0, 0), (0, 1)]
    assert losses(ddp.runs["adapter"]) == pytest.approx(alone[0], abs=1e-4)
    for figure in ("evalLossBefore", "evalLoss", "tokens"):
        assert (ended[0].metrics or {})[figure] == pytest.approx(alone[1][figure], abs=1e-4)


@pytest.mark.parametrize("case", PREFERRING, ids=lambda case: case.name)
def test_two_processes_prefer_as_one(case: Preferring, request: pytest.FixtureRequest) -> None:
    made: Group = request.getfixturevalue(case.strategy)
    run = made.runs[case.name]
    alone = FineTuneRun.model_validate_json((made.folder / case.name / "alone.json").read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        if case.fixed:
            one_after_another.fix_completions(patch.setattr)
        expect = train.main(alone).metrics or {}
    found = made.ends(case.name)[0].metrics or {}
    same = slice(case.same_steps)
    assert losses(run)[same] == pytest.approx(losses(alone)[same], abs=case.tolerance)
    assert {m.code for m in made.ends(case.name)} == {0}
    for name in case.figures + ("tokens",) * (case.same_steps != 0):
        assert found[name] == pytest.approx(expect[name], abs=case.tolerance), name
    types = [{tensor.dtype for tensor in tensors_of(each).values()} for each in (run, alone)]
    assert types[0] == types[1]


@pytest.mark.parametrize("case", [case for case in PREFERRING if case.stopped], ids=lambda case: case.name)
def test_two_stopped_processes_go_on_to_the_last_bit(case: Preferring, request: pytest.FixtureRequest) -> None:
    made: Group = request.getfixturevalue(case.strategy)
    name = case.name
    assert [(m.code, m.step, m.saved) for m in made.ends(f"{name}_stopped")] == [(75, 1, True), (75, 1, True)]
    assert [m.code for m in made.ends(f"{name}_resumed")] == [0, 0]
    assert losses(made.runs[f"{name}_resumed"]) == losses(made.runs[name])
    whole, resumed = (tensors_of(made.runs[of]) for of in (name, f"{name}_resumed"))
    assert whole
    assert all(tensor.equal(resumed[key]) for key, tensor in whole.items())


def tensors_of(run: FineTuneRun) -> dict[str, torch.Tensor]:
    """The weights of the result."""
    files = (Path(run.workspace) / "result").glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_two_processes_read_a_stream_as_one(ddp: Group) -> None:
    """In its second pass, too. One that goes on learns the same, to the last bit."""
    alone = FineTuneRun.model_validate_json((ddp.folder / "stream/alone.json").read_bytes())
    train.main(alone)
    assert len(losses(alone)) == 9
    assert losses(ddp.runs["stream"]) == pytest.approx(losses(alone), abs=1e-5)
    assert [(m.code, m.step) for m in ddp.ends("stream_stopped")] == [(75, 1), (75, 1)]
    assert "resuming from checkpoint-1\n" in ddp.log("stream_resumed")
    assert losses(ddp.runs["stream_resumed"]) == losses(ddp.runs["stream"])


def test_two_processes_are_rewarded_together(ddp: Group) -> None:
    """What is written depends on the number of processes, so one process alone would write something else."""
    first, second = ddp.ends("grpo")
    assert [(first.code, first.rank), (second.code, second.rank)] == [(0, 0), (0, 1)]
    for name in ("evalLoss", "reward", "kl", "completionLength", "trainReward"):
        assert (first.metrics or {})[name] == pytest.approx((second.metrics or {})[name], abs=1e-9), name


def test_two_processes_measure_what_they_deliver(ddp: Group) -> None:
    """Of the two processes' statistics of batches, those of the first are in the result."""
    result, rows = Path(ddp.runs["batch_norm"].workspace) / "result", image_data()["eval"]
    model = AutoModelForImageClassification.from_pretrained(result).eval()
    images = [row["pixel_values"].convert("RGB") for row in rows]
    with torch.no_grad():
        logits = model(**AutoImageProcessor.from_pretrained(result)(images=images, return_tensors="pt")).logits
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(rows["labels"])).item()
    assert loss == pytest.approx(json.loads((result / "metrics.json").read_text())["evalLoss"], abs=1e-5)


def test_two_pods_stop_together_and_go_on(tmp_path: Path, llama: Path, data: DatasetDict) -> None:
    """The pod of rank 1 is told to go, the other hears of it from its peer only, or later; both leave at one step."""
    steps = {"maxSteps": 40, "saveSteps": 1000, "logSteps": 10, "batchSize": 4}
    run = make(tmp_path, llama, data, resources={"nodes": 2}, training=steps)
    with ExitStack() as pods:
        processes = [pods.enter_context(pod(run, tmp_path / f"pod-{node}", node)) for node in (0, 1)]
        deadline = time.monotonic() + TIMEOUT
        # During the evaluation before it, there would be nothing to save
        while "step 1/40" not in (tmp_path / "pod-0/log").read_text():
            assert time.monotonic() < deadline, (tmp_path / "pod-1/log").read_text()
            time.sleep(0.05)
        (tmp_path / "pod-1/stop").touch()
        time.sleep(0.3)
        (tmp_path / "pod-0/stop").touch()
        codes = [process.wait(TIMEOUT) for process in processes]
    stopped = messages(tmp_path, codes)
    assert [(m.code, m.saved) for m in stopped] == [(75, True), (75, True)]
    assert stopped[0].step == stopped[1].step
    step = stopped[0].step
    assert step is not None
    assert 0 < step < 40
    folder = tmp_path / f"job/checkpoints/checkpoint-{step}"
    assert {"rng_state_0.pth", "rng_state_1.pth", "MANIFEST.json"} <= {p.name for p in folder.iterdir()}

    for node in (0, 1):
        shutil.rmtree(tmp_path / f"pod-{node}")
    ended = finish(run, tmp_path, nodes=2)
    assert [(m.code, m.step) for m in ended] == [(0, 40), (0, 40)]
    assert f"resuming from checkpoint-{step}" in (tmp_path / "pod-0/log").read_text()
    assert "step " not in (tmp_path / "pod-1/log").read_text()  # one log a run
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "job/result")


def test_zero1(zero1: Group, llama: Path, alone: Any) -> None:
    """The losses of one process; of all weights on after a stop, to the last bit; and files as large as was planned."""
    assert [m.code for m in zero1.ends("adapter")] == [0, 0]
    assert losses(zero1.runs["adapter"]) == pytest.approx(alone[0], abs=2e-4)
    assert [(m.code, m.step) for m in zero1.ends("whole_stopped")] == [(75, 1), (75, 1)]
    assert "resuming from checkpoint-1\n" in zero1.log("whole_resumed")
    assert losses(zero1.runs["whole_resumed"]) == losses(zero1.runs["whole"])
    writes_what_was_foreseen(zero1.runs["whole"], llama)


@pytest.mark.parametrize("name", MICRO_BATCHES)
def test_zero2(name: str, zero2: Group, resumed: Group, alone: Any) -> None:
    """Stopped after its first step, and resumed from DeepSpeed's own shards: still the losses of one process."""
    assert [(m.code, m.step, m.saved) for m in zero2.ends(name)] == [(75, 1, True), (75, 1, True)]
    run, micro_batch = resumed.runs[name], MICRO_BATCHES[name]
    assert (Path(run.workspace) / "checkpoints/checkpoint-1/global_step1").is_dir()
    assert [m.code for m in resumed.ends(name)] == [0, 0]
    log = resumed.log(name)
    assert f"2 × {micro_batch} rows × {4 // micro_batch} accumulated" in log
    assert ", resuming from checkpoint-1\n" in log
    assert losses(run) == pytest.approx(alone[0], abs=2e-4)


@pytest.fixture(scope="module")
def fsdp(ddp: Group) -> Group:
    """The runs with FSDP, which processes of the same start train as those with DDP."""
    return ddp


def plainly_trained(model: Path, rows: Dataset, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of each step over all rows, and the weights in the end, of plain torch in one process."""
    trained = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2, eps=1e-3, weight_decay=0.0)
    found = []
    for _ in range(steps):
        total, labels = torch.zeros(()), 0
        for row in rows:
            begin = 0
            for length in row["seq_lengths"]:  # documents that do not see each other
                ids = torch.tensor(row["input_ids"][begin : begin + length])[None]
                learnt = torch.tensor(row["loss_mask"][begin : begin + length])[1:].bool()
                logits = trained(input_ids=ids).logits[0, :-1]
                losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
                total, labels, begin = total + losses[learnt].sum(), labels + int(learnt.sum()), begin + length
        (total / labels).backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total.detach() / labels))
    return found, trained.state_dict()


def test_fsdp_trains_as_plain_torch_does(fsdp: Group, llama: Path, data: DatasetDict) -> None:
    """All weights, and the files as plain transformers loads them."""
    run = fsdp.runs["fsdp_unevaluated"]
    assert [m.code for m in fsdp.ends("fsdp_unevaluated")] == [0, 0]
    expect, weights = plainly_trained(llama, data["train"].select(range(8)), steps=6)
    assert losses(run) == pytest.approx(expect, abs=1e-5)
    result = AutoModelForCausalLM.from_pretrained(Path(run.workspace) / "result")
    assert result.dtype == AutoModelForCausalLM.from_pretrained(llama).dtype
    for name, weight in result.state_dict().items():
        assert torch.allclose(weight, weights[name], atol=1e-5), name


def test_fsdp_trains_an_adapter(fsdp: Group, alone: Any, llama: Path) -> None:
    """Its checkpoints hold the shards of what learns, and nothing of the frozen base."""
    run = fsdp.runs["fsdp_adapter"]
    assert losses(run) == pytest.approx(alone[0], abs=1e-5)
    folder = WorkspaceFolder(Path(run.workspace))
    assert json.loads((folder.result / "metrics.json").read_text())["evalLoss"] == pytest.approx(
        alone[1]["evalLoss"], abs=1e-5
    )
    weights = load_file(folder.result / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7  # two matrices for each of seven linear modules of two layers
    assert all(torch.isfinite(w).all() and w.abs().sum() > 0 for w in weights.values())
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder.result)
    assert torch.isfinite(adapted(input_ids=torch.arange(8)[None]).logits).all()
    numbers = sum(weight.numel() for weight in weights.values())
    shards = [*folder.checkpoints.glob("checkpoint-6/fsdp_rank_*_states.pt")]
    assert len(shards) == 2
    assert sum(file.stat().st_size for file in shards) < 12 * numbers + 2 * space.TENSOR_BYTES * 3 * len(weights)


def test_fsdp_goes_on_to_the_last_bit(fsdp: Group) -> None:
    assert [(m.code, m.step, m.saved) for m in fsdp.ends("fsdp_whole_stopped")] == [(75, 1, True), (75, 1, True)]
    assert ", resuming from checkpoint-1\n" in fsdp.log("fsdp_whole_resumed")
    resumed, whole = fsdp.runs["fsdp_whole_resumed"], fsdp.runs["fsdp_unevaluated"]
    assert losses(resumed) == losses(whole)
    found, expect = courses.weights(resumed), courses.weights(whole)
    assert found.keys() == expect.keys()
    assert all(torch.equal(weight, expect[name]) for name, weight in found.items())


def test_fsdp_delivers_the_best_weights(fsdp: Group) -> None:
    """Those of the first evaluation: the rest of the training is of other texts than are evaluated."""
    best, whole = fsdp.runs["fsdp_best"], fsdp.runs["fsdp_whole"]
    assert losses(best) == losses(whole)
    assert (fsdp.ends("fsdp_best")[0].metrics or {})["bestStep"] == 2
    found = torch.cat([weight.flatten() for weight in courses.weights(best).values()])
    held = [
        torch.load(Path(best.workspace) / f"checkpoints/checkpoint-2/fsdp_rank_{rank}_states.pt")["weights"]
        for rank in range(2)
    ]
    whole_again = {name: torch.cat([shard[name] for shard in held]) for name in held[0]}
    assert torch.equal(found, torch.cat([whole_again[name].flatten() for name in courses.weights(best)]))


def test_zero3(zero3: Group, alone: Any) -> None:
    run = zero3.runs["adapter"]
    assert [m.code for m in zero3.ends("adapter")] == [0, 0]
    assert losses(run) == pytest.approx(alone[0], abs=2e-4)
    result = Path(run.workspace) / "result"
    weights = load_file(result / "adapter_model.safetensors")
    assert len(weights) == 2 * 2 * 7  # two matrices for each of seven linear modules of two layers
    assert all(torch.isfinite(w).all() and w.abs().sum() > 0 for w in weights.values())
    assert json.loads((result / "metrics.json").read_text())["evalLoss"] == pytest.approx(
        alone[1]["evalLoss"], abs=2e-4
    )


def test_zero3_keeps_an_output_layer_that_only_the_configuration_ties(zero3: Group, alone: Any) -> None:
    """As of mT0, and of T5 since version 1.1, whose output layer transformers 5.23 ties in each configuration."""
    assert losses(zero3.runs["own-output"]) == pytest.approx(alone[0][:1], abs=2e-4)


@pytest.mark.parametrize("case", SHARDS, ids=lambda case: case.name)
def test_zero3_loads_what_the_files_hold(case: Shards, zero3: Group) -> None:
    """To the last bit, in two processes of which each keeps its half."""
    folder = zero3.folder / case.name
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    expect = dict(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=dtype).named_parameters())
    found = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in load_file(folder / one_after_another.LOADED).items()
        if ".lora_" not in name
    }
    assert found.keys() == expect.keys()
    assert [name for name, weight in expect.items() if not torch.equal(found[name], weight)] == []
    assert {weight.dtype for weight in found.values()} == {dtype}


@pytest.mark.parametrize("strategy", ["zero2-offload", "zero3-offload"])
def test_with_the_optimizer_on_the_cpu(
    strategy: str, group: Any, deepspeed_optimizer: None, llama: Path, data: DatasetDict, alone: Any
) -> None:
    made: Group = group(adapter=lambda root: two(root, llama, data, strategy=strategy))
    made.train_all()
    assert [m.code for m in made.ends("adapter")] == [0, 0]
    assert "6 steps, AdamW on the CPU by DeepSpeedCPUAdam, " in made.log("adapter")
    assert losses(made.runs["adapter"]) == pytest.approx(alone[0], abs=2e-4)


@pytest.mark.parametrize("case", CLASSIFIERS, ids=lambda case: case.name)
def test_two_processes_are_one_classifier(case: Case, request: pytest.FixtureRequest) -> None:
    """Each takes two micro-batches a step; the mean is over the rows of all."""
    group: Group = request.getfixturevalue(case.strategy)
    run, root = group.runs[case.name], group.folder / case.name
    alone = FineTuneRun.model_validate_json((root / "alone.json").read_bytes())
    metrics = train.main(alone).metrics or {}
    ended = group.ends(case.name)
    assert [m.code for m in ended] == [0, 0]
    names = [load_file(root / folder / "result/model.safetensors").keys() for folder in ("alone", "job")]
    assert names[0] == names[1]
    assert losses(run) == pytest.approx(losses(alone), abs=2e-4)
    for figure in {"evalLossBefore", "evalLoss", "accuracy", "tokens"} & metrics.keys():
        assert (ended[0].metrics or {})[figure] == pytest.approx(metrics[figure], abs=2e-4)
    if case.strategy.startswith("zero"):
        writes_what_was_foreseen(run, root / "base")


def writes_what_was_foreseen(run: FineTuneRun, base: Path) -> None:
    """Checkpoints of DeepSpeed hold its shards alone: no copy of all weights beside them."""
    folder, plan = WorkspaceFolder(Path(run.workspace)), read_prepared(run).plan
    weights = trainable.weights_of(AutoConfig.from_pretrained(base, num_labels=2), run.spec, plan, base)
    foreseen = space.checkpoint_bytes(weights, plan.strategy, plan.world_size, processor_bytes=0)
    saved = folder.checkpoints / f"checkpoint-{plan.steps}"
    assert space.folder_bytes(saved) == pytest.approx(foreseen, rel=0.08)
    assert not list(saved.glob("*.safetensors"))
    processor = space.folder_bytes(folder.prepared / "processor")
    assert space.folder_bytes(folder.result) == pytest.approx(
        space.result_bytes(weights, plan.strategy, processor), rel=0.05
    )


@pytest.fixture(scope="module")
def alone_in_course(llama: Path, data: DatasetDict, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """What makes the run of one process that has the course."""

    @functools.cache
    def make(name: str) -> FineTuneRun:
        course = next(course for course in COURSES if course.name == name)
        root = tmp_path_factory.mktemp("course")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LUTHIER_RUN_DIR", str(root))
            run = courses.runs(root / "job", course, llama, data, "auto")
            train.main(run)
        return run

    return make


@pytest.mark.parametrize(
    ("course", "strategy"),
    [
        pytest.param(course, strategy, id=f"{course.name}-{strategy}")
        for course in COURSES
        for strategy in course.strategies
        if strategy != "ddp"
    ],
)
def test_a_course_is_the_same_with_deepspeed(
    course: Course, strategy: str, alone_in_course: Any, request: pytest.FixtureRequest
) -> None:
    made: Group = request.getfixturevalue(strategy)
    run = made.runs[course.name]
    expect = request.getfixturevalue("ddp").runs[course.name] if course.of_each else alone_in_course(course.name)
    found, wanted = courses.History.of(run), courses.History.of(expect)
    assert found.steps == wanted.steps
    for name in ("losses", "evaluations", "learning_rates"):
        assert getattr(found, name) == pytest.approx(getattr(wanted, name), abs=1e-4), name
    weights, others = courses.weights(run), courses.weights(expect)
    assert weights.keys() == others.keys()
    assert {name for name, weight in weights.items() if (weight - others[name]).abs().max() > 1e-3} == set()
    if course.chooses:
        metrics = made.ends(course.name)[0].metrics or {}
        assert metrics["bestStep"] == 2
        assert metrics["steps"] == (6 if "earlyStopping" in course.training else 8)
        assert metrics["evalLoss"] == pytest.approx(found.evaluations[2], abs=1e-5)
        files = list((Path(run.workspace) / "result").glob("model-*.safetensors"))
        assert (len(files) > 1) == (course.method["type"] == "full")
        checkpoint = Path(run.workspace) / "checkpoints/checkpoint-2"
        written = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), exclude_frozen_parameters=True)
        assert written.keys() == {courses.in_memory(name) for name in weights}
        assert all(torch.equal(written[courses.in_memory(name)], weight) for name, weight in weights.items())
