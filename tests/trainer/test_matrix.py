"""What docs/matrix.md allows is trained for some steps: every tensor that learns changes, and no other.

`make test` trains few cells, in which every allowed pair of two choices occurs. `pytest tests/trainer/test_matrix.py
--all-cells` trains all of them, and every method with every strategy in two processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import DatasetDict
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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.matrix import AXES, Axis, Cell, cells, pairwise, spec_of
from luthier_api.methods import METHODS
from luthier_api.tasks import TASKS, TRAINING_TASKS
from luthier_trainer.methods.apply import weights_options, with_method
from luthier_trainer.methods.table import FAMILIES
from luthier_trainer.models.heads import row_loss
from luthier_trainer.tasks.base import TrainingContext
from luthier_trainer.tasks.table import task_of

STEPS = 3


@dataclass(frozen=True)
class Small:
    """A small model of a task, and rows for it."""

    folder: Path
    data: DatasetDict
    packed: DatasetDict | None = None
    labels: tuple[str, ...] | None = None


ELSEWHERE = {
    "preference": "tasks/test_preference.py",
    "reward": "tasks/test_reward.py",
    "grpo": "tasks/test_grpo.py",
    "text-to-image": "tasks/test_text_to_image.py",
    **dict.fromkeys(
        ("seq2seq", "token-classification", "question-answering", "masked-lm", "embedding"), "tasks/test_text_tasks.py"
    ),
}
"""Tasks whose step is more than a forward pass and a loss → where each of their methods is trained."""


@pytest.fixture(scope="module")
def small(
    llama: Path, vit: Path, prose_data: DatasetDict, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, Small]:
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(1)
    encoder = save_encoder(tmp_path_factory.mktemp("models") / "bert", tokenizer)
    texts = classification_data(tokenizer, paragraphs)
    config = AutoConfig.from_pretrained(llama)
    config.attention_bias = config.mlp_bias = True  # for what trains biases
    decoder = tmp_path_factory.mktemp("models") / "llama"
    AutoModelForCausalLM.from_config(config).save_pretrained(decoder)
    tokenizer.save_pretrained(decoder)
    return {
        "causal-lm": Small(decoder, prose_data, packed_data(tokenizer, prose(paragraphs), rows=4)),
        "text-classification": Small(encoder, texts, labels=("0", "1")),
        "image-classification": Small(vit, image_data(), labels=("0", "1")),
    }


TASKS_HERE = ("causal-lm", "text-classification", "image-classification")


def in_one_process() -> tuple[Axis, ...]:
    """The choices, of the tasks that are trained here, without the strategy."""
    return tuple(
        replace(axis, values=TASKS_HERE) if axis.name == "task" else axis for axis in AXES if axis.name != "strategy"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    whole = metafunc.config.getoption("--all-cells")
    if "cell" in metafunc.fixturenames:
        found = [*cells(in_one_process())] if whole else pairwise(in_one_process())
        metafunc.parametrize("cell", found, ids=["-".join(cell.values()) for cell in found])
    if "pair" in metafunc.fixturenames:
        found = [cell for cell in cells([axis for axis in AXES if axis.name in ("method", "strategy")]) if whole]
        metafunc.parametrize("pair", found, ids=["-".join(cell.values()) for cell in found])


def test_no_task_is_left_out() -> None:
    assert {*TASKS_HERE, *ELSEWHERE} >= set(TRAINING_TASKS)
    assert [path for path in ELSEWHERE.values() if not (Path(__file__).parent / path).is_file()] == []


def test_a_cell_trains_what_learns_and_nothing_else(cell: Cell, small: Mapping[str, Small]) -> None:
    given = small[cell["task"]]
    model, step = trained_model(cell, given)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=2e-3, weight_decay=0.0)
    found = []
    for _ in range(STEPS):
        loss = step()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    changed = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert learning
    assert changed == learning
    assert found[-1] < found[0]


def trained_model(cell: Cell, given: Small) -> tuple[Any, Callable[[], torch.Tensor]]:
    """(the model with its method as `run` makes it, a function that returns the loss of the same batch)"""
    own = spec_of(cell)
    if "method.virtualTokens" in METHODS[cell["method"]].options:  # type: ignore[index]  # a text
        own["method"]["virtualTokens"] = 4
    if (cell["task"], cell["method"]) == ("image-classification", "ia3"):  # PEFT has no usual modules of ViT
        own["method"]["targetModules"] = ["all-linear"]
    spec = FineTuneJobSpec.model_validate(
        own
        | {
            "model": {"path": str(given.folder)} | own.get("model", {}),
            "dataset": {"files": ["unused.jsonl"]},
            "resources": {"gpusPerNode": 0},
        }
    )
    task, device = task_of(spec), torch.device("cpu")
    torch.manual_seed(0)
    labels = list(given.labels) if given.labels else None
    weights = weights_options(spec.method, "fp32", False, device, spec.model.quantization)
    processor = task.read_processor(given.folder, "spec.model")
    context = TrainingContext(spec, given.folder, processor, labels, weights=weights)
    loaded = task.load_model(context)
    peft_type = TASKS[spec.task].peft_task_type
    model = with_method(loaded.model, spec.method, peft_type, loaded.new_modules, deepspeed=False)
    if spec.method.type in FAMILIES:
        FAMILIES[spec.method.type].begin(model, spec.method, processor)
    setup = task.trainer(context, loaded.model)
    rows = given.packed if spec.training.packing == "isolated" else given.data
    assert rows is not None
    batch = setup.collator([rows["train"][i] for i in range(4)])
    for name, weight in model.named_parameters():
        if name.rpartition("base_model.model.")[2].replace(".base_layer", "") in loaded.unused_parameters:
            weight.requires_grad_(False)
    model.train()
    if spec.training.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def step() -> torch.Tensor:
        torch.manual_seed(1)
        if TASKS[spec.task].head:
            outputs = model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            return row_loss(outputs, batch["labels"])
        loss: torch.Tensor = model(**batch).loss
        return loss

    return model, step


def test_a_method_trains_in_two_processes(
    pair: Cell, tmp_path: Path, small: Mapping[str, Small], prose_data: DatasetDict
) -> None:
    data = DatasetDict(train=prose_data["train"].select(range(64)), eval=prose_data["eval"].select(range(4)))
    run = prepared_run(
        tmp_path / "job",
        small["causal-lm"].folder,
        data,
        port=29_871,
        method={"type": pair["method"]},
        strategy=pair["strategy"],
        resources={"processesPerNode": 2},
        training={"maxSteps": 6, "learningRate": 1e-2, "saveSteps": 6},
    )
    with pod(run, tmp_path / "pod") as process:
        assert process.wait(300) == 0, (tmp_path / "pod/log").read_text()[-3000:]
    found = losses(run)
    assert found[-1] < found[0]
