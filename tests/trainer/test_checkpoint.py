"""Which checkpoint is resumed from, and what becomes of the others. No training here: folders and manifests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from luthier_trainer import checkpoint
from luthier_trainer.checkpoint import facts_of, newest
from luthier_trainer.ending import Failure
from luthier_trainer.manifest import read_manifest, write_manifest

OURS = {"spec.method": {"type": "lora", "rank": 8}, "spec.strategy": "none"}


def save(folder: Path, step: int, identity: dict[str, Any] = OURS) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights of step %d" % step)
    (path / "rng_state.pth").write_bytes(b"state")
    write_manifest(path, step=step, **facts_of(identity))
    return path


def damage(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[::-1])


def truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weights")


def lose(path: Path) -> None:
    (path / "model.safetensors").unlink()


def half_write(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


DAMAGES: list[tuple[str, Callable[[Path], None]]] = [("changed", damage), ("shorter", truncate), ("gone", lose), ("no manifest", half_write)]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoints"
    path.mkdir()
    return path


def test_nothing_yet(tmp_path: Path) -> None:
    assert newest(tmp_path / "checkpoints", OURS) is None
    (tmp_path / "checkpoints").mkdir()
    assert newest(tmp_path / "checkpoints", OURS) is None


def test_the_highest_step_wins_not_the_last_name(folder: Path) -> None:
    for step in (9, 100, 20):
        save(folder, step)
    assert newest(folder, OURS) == folder / "checkpoint-100"


@pytest.mark.parametrize(("name", "harm"), DAMAGES, ids=[d[0] for d in DAMAGES])
def test_a_broken_one_is_set_aside(name: str, harm: Callable[[Path], None], folder: Path) -> None:
    save(folder, 10)
    harm(save(folder, 20))
    assert newest(folder, OURS) == folder / "checkpoint-10"
    assert names(folder) == [".corrupt-checkpoint-20", "checkpoint-10"]


def test_all_broken(folder: Path) -> None:
    for step in (10, 20):
        damage(save(folder, step))
    assert newest(folder, OURS) is None
    assert names(folder) == [".corrupt-checkpoint-10", ".corrupt-checkpoint-20"]


def test_left_overs_of_an_interrupted_save_are_removed(folder: Path) -> None:
    save(folder, 10)
    save(folder / ".staging-checkpoint-20", 20)
    assert newest(folder, OURS) == folder / "checkpoint-10"
    assert names(folder) == ["checkpoint-10"]


def test_another_runs_checkpoint_is_refused_and_kept(folder: Path) -> None:
    save(folder, 10, OURS | {"spec.method": {"type": "lora", "rank": 16}})
    with pytest.raises(Failure) as caught:
        newest(folder, OURS)
    assert (caught.value.code, caught.value.message) == (
        64,
        f"{folder}/checkpoint-10 was made by a run with other settings: spec.method.rank is 8, there it was 16. "
        "Start over: with --fresh on a laptop, under another metadata.name on a cluster",
    )
    assert names(folder) == ["checkpoint-10"]


def staged(folder: Path, step: int, states: list[str]) -> Path:
    path = folder / f".staging-checkpoint-{step}" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    for name in states:
        (path / name).write_bytes(b"state")
    return path


def test_commit(folder: Path) -> None:
    path = checkpoint.commit(staged(folder, 7, ["rng_state_0.pth", "rng_state_1.pth"]), folder, 2, {"step": 7, **facts_of(OURS)})
    assert names(folder) == ["checkpoint-7"]
    assert (read_manifest(path) or {})["step"] == 7
    assert newest(folder, OURS) == path


def test_commit_replaces_one_of_the_same_step(folder: Path) -> None:
    damage(save(folder, 7))
    checkpoint.commit(staged(folder, 7, ["rng_state.pth"]), folder, 1, facts_of(OURS))
    assert newest(folder, OURS) == folder / "checkpoint-7"
    assert names(folder) == ["checkpoint-7"]


def test_pods_that_do_not_share_the_volume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARED_VOLUME_SECONDS", 0.0)
    with pytest.raises(Failure) as caught:
        checkpoint.commit(staged(folder, 7, ["rng_state_0.pth"]), folder, 2, facts_of(OURS))
    assert caught.value.code == 74
    assert caught.value.message.startswith("spec.workspace: only 1 of 2 processes could be seen writing")
    assert not (folder / "checkpoint-7").exists()


ROTATIONS = [
    # given          keep  left
    ([10],           2,    [10]),
    ([10, 20],       2,    [10, 20]),
    ([9, 10, 100],   2,    [10, 100]),
    ([10, 20, 30],   1,    [30]),
]  # fmt: skip


@pytest.mark.parametrize(("given", "keep", "left"), ROTATIONS)
def test_rotate(given: list[int], keep: int, left: list[int], folder: Path) -> None:
    for step in given:
        save(folder, step)
    damage(save(folder / ".corrupt", 5))
    checkpoint.rotate(folder, keep)
    assert sorted(map(checkpoint.step_of, checkpoint.checkpoints(folder))) == left
