"""What TensorBoard's own reader finds in the workspace after a training, also one that was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict
from prepared_workspace import losses, prepared_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from luthier_trainer.runtime import notices
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Heartbeat
from luthier_trainer.workspace import tracked_runs

STEPS = 8


@pytest.fixture(scope="module")
def data(prose_data: DatasetDict) -> DatasetDict:
    return DatasetDict(train=prose_data["train"].select(range(80)), eval=prose_data["eval"].select(range(8)))


def make(root: Path, llama: Path, data: DatasetDict, **spec: Any) -> Any:
    training = {"maxSteps": STEPS, "learningRate": 1e-2, "evalSteps": 4, "saveSteps": 3}
    method = {"type": "lora", "rank": 4, "dropout": 0.1}
    return prepared_run(root, llama, data, method=method, training=training, **spec)


def history(root: Path) -> list[dict[str, Any]]:
    state: dict[str, Any] = json.loads((root / f"checkpoints/checkpoint-{STEPS}/trainer_state.json").read_text())
    return state["log_history"]


def shown(root: Path) -> EventAccumulator:
    return EventAccumulator(str(root / "tracking/tensorboard/job")).Reload()


def broken_after(run: Any, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until the process of `step` raises, without a checkpoint of that step."""

    class Breaking(Heartbeat):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step:
                raise RuntimeError("broken")

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Breaking)
        with pytest.raises(RuntimeError, match="broken"):
            train.main(run)


def test_an_interrupted_training_is_one_run(
    tmp_path: Path, llama: Path, data: DatasetDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step once, although the first attempt was lost from step 4 on; and tracking changes nothing else."""
    plain, tracked = (make(tmp_path / name, llama, data) for name in ("plain", "tracked"))
    spec = tracked.spec.model_validate(tracked.spec.dump() | {"tracking": [{"type": "tensorboard"}]})
    tracked = tracked.model_copy(update={"spec": spec})
    train.main(plain)
    assert not (tmp_path / "plain/tracking").exists()
    broken_after(tracked, 6, monkeypatch)
    assert [event.step for event in shown(tmp_path / "tracked").Scalars("train/loss")] == [1, 2, 3, 4, 5]
    train.main(tracked)
    assert notices.given() == []
    assert losses(tracked) == losses(plain)

    (run,) = tracked_runs.read(tmp_path / "tracked/tracking")
    assert (run.type, run.url, run.run) == ("tensorboard", None, "tracking/tensorboard/job")
    found = shown(tmp_path / "tracked")
    reports = [entry for entry in history(tmp_path / "plain") if "loss" in entry]
    for name, key in (("train/loss", "loss"), ("train/learning_rate", "learning_rate")):
        read = [(event.step, event.value) for event in found.Scalars(name)]
        assert [step for step, _ in read] == list(range(1, STEPS + 1))
        assert [value for _, value in read] == pytest.approx([entry[key] for entry in reports], rel=1e-6)
    assert [event.step for event in found.Scalars("eval/loss")] == [0, 4, 8]

    texts = {
        tag.removesuffix("/text_summary"): found.Tensors(tag)[-1].tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
    }
    documents = {name: json.loads(text.removeprefix("```json\n").removesuffix("\n```")) for name, text in texts.items()}
    assert documents["spec"] == spec.dump()
    assert documents["provenance"]["model"] == {"source": str(llama)}
    assert documents["provenance"]["dataset"]["rows"] == 80
