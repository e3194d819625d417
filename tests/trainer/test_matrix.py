"""What docs/matrix.md allows is prepared and trained: each tensor that learns changes, and no other; and the result, as
transformers, PEFT or diffusers load it, computes what the trained model does.

`make test` trains each method with what it may not work with, and each task. The slow tests add cells, until every
allowed pair of two choices has occurred, and train in two processes each task and each method with ddp, zero2, zero3
and fsdp.
`pytest tests/trainer/test_matrix.py --all-cells` trains all cells.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_workspace import losses
from safetensors.torch import load_file
from trainer.cells import VOCABULARY, Changes, Kind, answers, job, kinds
from trainer.distributed.groups import TIMEOUT, Group, free_port

from luthier_api.matrix import AXES, UNQUANTISED, Axis, Cell, cells, covering, pairwise
from luthier_api.run import FineTuneRun
from luthier_api.tasks import TRAINING_TASKS
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.training import main as train

# diffusers and numpy 2 talk about each other.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ELSEWHERE: Mapping[str, str] = {}
"""Tasks that are not trained here → the file in which their methods are."""
HERE = tuple(task for task in TRAINING_TASKS if task not in ELSEWHERE)


@pytest.fixture(scope="module")
def small(llama: Path, paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Kind]:
    return kinds(tmp_path_factory.mktemp("models"), llama, paragraphs)


def axes(*strategy: str) -> tuple[Axis, ...]:
    """The choices, of the tasks that are trained here, with this strategy; without one, in one process."""
    values = {"task": HERE, "strategy": strategy}
    found = (replace(axis, values=values.get(axis.name, axis.values)) for axis in AXES)
    return tuple(axis for axis in found if axis.values)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" not in metafunc.fixturenames:
        return
    quick = covering(axes(), quickly_tried)
    others = pairwise(axes())
    if metafunc.config.getoption("--all-cells"):
        quick, others = [*cells(axes())], []
    slow = [pytest.param(cell, marks=pytest.mark.slow) for cell in others if cell not in quick]
    metafunc.parametrize("cell", [*quick, *slow], ids=lambda cell: "-".join(cell.values()))


def quickly_tried(cell: Cell) -> set[Any]:
    """What `make test` covers: each method quantised, packed in each way, and recomputing; each task, and each type."""
    chosen = {"quantised": cell["quantization"] != UNQUANTISED, "recomputing": cell["recomputing"] == "true"}
    choices = {choice for choice, made in chosen.items() if made} | {cell["packing"]} - {"none"}
    return {(cell["method"], choice) for choice in choices} | {cell["task"], cell["quantization"]}


def test_no_task_is_left_out(small: Mapping[str, Kind]) -> None:
    assert {*small, *ELSEWHERE} == set(TRAINING_TASKS)
    assert [path for path in ELSEWHERE.values() if not (Path(__file__).parent / path).is_file()] == []


def test_a_cell_trains_what_learns_and_nothing_else(cell: Cell, small: Mapping[str, Kind], tmp_path: Path) -> None:
    kind, changes = small[cell["task"]], Changes()
    run = job(tmp_path, kind, cell)
    prepare.main(run)
    metrics = train.main(run, [changes]).metrics
    assert metrics is not None
    assert changes.learning
    assert changes.changed == changes.learning
    assert not [text for text in notices.given() if "the plan has counted" in text]
    assert 0 < changes.kept < VOCABULARY, "logits of tokens are reduced where they are computed"
    assert metrics["evalLoss"] < metrics["evalLossBefore"] or not kind.learns
    plain = kind.load(kind, tmp_path / "job/result", cell)
    # Products with quantised weights are in bf16, which makes the last bit of a number a part in 256 of it.
    tolerance = 1e-4 if run.spec.model.quantization is None else 5e-3
    assert torch.allclose(answers(plain, kind), answers(changes.loop.model, kind), atol=tolerance)


CLOSE = {"epsilon": 1e-3}
"""With a larger epsilon than the default, Adam does not amplify the differences in rounding."""
SECONDS_A_CELL = 20  # at most, on a machine that has other things to do


VARIANTS = ("zero1", "zero2-offload", "zero3-offload")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", next(axis.values for axis in AXES if axis.name == "strategy"))
def test_two_processes_train_what_one_does(
    strategy: str, small: Mapping[str, Kind], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Losses and results of each task and each method. What grpo writes depends on the number of processes: it only has
    to end well.
    """
    if strategy.startswith("zero"):
        request.getfixturevalue("deepspeed_optimizer" if strategy.endswith("offload") else "deepspeed_operators")
    every = request.config.getoption("--all-cells")
    if strategy in VARIANTS and not every:
        pytest.skip("takes minutes, and is a variant of zero2 or zero3: run with --all-cells")
    chosen = cells(axes(strategy)) if every else covering(axes(strategy), lambda cell: {cell["task"], cell["method"]})
    tried = {"-".join(cell.values()): cell for cell in chosen}
    group, alone = Group(tmp_path / "two", {}), dict[str, FineTuneRun]()
    small = {task: without_chance(kind, tmp_path / "models" / task) for task, kind in small.items()}
    for name, cell in tried.items():
        kind, one = small[cell["task"]], {axis: value for axis, value in cell.items() if axis != "strategy"}
        group.runs[name] = job(group.folder / name, kind, cell, free_port(), processes=2, optimizerOptions=CLOSE)
        alone[name] = job(tmp_path / "one" / name, kind, one, optimizerOptions=CLOSE)
        for run in (group.runs[name], alone[name]):
            prepare.main(run)
    group.train(timeout=TIMEOUT + SECONDS_A_CELL * len(tried))
    differing = {}
    for name, run in alone.items():
        if [message.code for message in group.ends(name)] != [0, 0]:
            differing[name] = group.log(name)[-1000:]
            continue
        if run.spec.task == "grpo":
            continue
        train.main(run)
        if difference := difference_of(group.runs[name], run):
            differing[name] = difference
    assert differing == {}


def without_chance(kind: Kind, folder: Path) -> Kind:
    """The same with a model that leaves out nothing at random: what is drawn depends on the number of processes."""
    file = kind.model / "config.json"  # which pipelines lack
    config = json.loads(file.read_text()) if file.exists() else {}
    chances = {name: 0.0 for name, value in config.items() if "dropout" in name and value}
    if config.get("apply_spec_augment"):
        chances["apply_spec_augment"] = False
    if not chances:
        return kind
    shutil.copytree(kind.model, folder)
    (folder / "config.json").write_text(json.dumps(config | chances))
    return replace(kind, model=folder)


def difference_of(run: FineTuneRun, other: FineTuneRun) -> str | None:
    """What two trainings differ in; None if they are the same but for rounding."""
    found, expect = losses(run), losses(other)
    if found != pytest.approx(expect, abs=5e-4):
        return f"losses {found} instead of {expect}"
    weights, others = (tensors(Path(each.workspace) / "result") for each in (run, other))
    if weights.keys() != others.keys():
        return f"weights {sorted(weights.keys() ^ others.keys())[:5]}"
    far = [name for name, weight in weights.items() if not torch.allclose(weight, others[name], atol=2e-3)]
    return f"{len(far)} of {len(weights)} weights, among them {far[0]}" if far else None


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a result."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
