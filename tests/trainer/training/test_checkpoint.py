"""Which checkpoint is resumed from, and what becomes of the others. No training here: folders and manifests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier_api.workspace import MANIFEST
from luthier_trainer.distributed.ranks import Ranks
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.heartbeat import HEARTBEAT_FILE, STARTING_FILE
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import checkpoint
from luthier_trainer.training.checkpoint import facts_of
from luthier_trainer.workspace.manifest import problems, read_manifest, write_manifest

OURS = {"spec.method": {"type": "lora", "rank": 8}, "spec.strategy": "none"}


def save(folder: Path, step: int, identity: dict[str, Any] = OURS) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights of step %d" % step)
    (path / "rng_state.pth").write_bytes(b"state")
    write_manifest(path, step=step, **facts_of(identity))
    return path


def newest(folder: Path, wanted: dict[str, Any]) -> Path | None:
    """Of a run of one process."""
    return checkpoint.newest(folder, wanted, Ranks())


def damage(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[::-1])


def truncate(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"weights")


def lose(path: Path) -> None:
    (path / "model.safetensors").unlink()


def half_write(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def rewrite(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Harm that is done to the manifest alone."""

    def harm(path: Path) -> None:
        document = json.loads((path / MANIFEST).read_text())
        change(document)
        (path / MANIFEST).write_text(json.dumps(document))

    return harm


@dataclass(frozen=True)
class DamageCase:
    name: str
    damage: Callable[[Path], None]


DAMAGES = [
    DamageCase(
        name="changed",
        damage=damage,
    ),
    DamageCase(
        name="shorter",
        damage=truncate,
    ),
    DamageCase(
        name="gone",
        damage=lose,
    ),
    DamageCase(
        name="no manifest",
        damage=half_write,
    ),
    DamageCase(
        name="a manifest without a size",
        damage=rewrite(lambda m: m["files"][0].pop("size")),
    ),
    DamageCase(
        name="a manifest without a digest",
        damage=rewrite(lambda m: m["files"][0].pop("sha256")),
    ),
    DamageCase(
        name="a manifest whose files are names",
        damage=rewrite(lambda m: m.update(files=["model.safetensors"])),
    ),
    DamageCase(
        name="a manifest with no files",
        damage=rewrite(lambda m: m.update(files=[])),
    ),
    DamageCase(
        name="a manifest of files elsewhere",
        damage=rewrite(lambda m: m["files"][0].update(path="../checkpoint-10/model.safetensors")),
    ),
]


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


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.name)
def test_a_broken_one_is_set_aside(case: DamageCase, folder: Path) -> None:
    save(folder, 10)
    case.damage(save(folder, 20))
    assert newest(folder, OURS) == folder / "checkpoint-10"
    assert names(folder) == [".corrupt-checkpoint-20", "checkpoint-10"]


def test_all_broken(folder: Path) -> None:
    for step in (10, 20):
        damage(save(folder, step))
    assert newest(folder, OURS) is None
    assert names(folder) == [".corrupt-checkpoint-10", ".corrupt-checkpoint-20"]


def test_the_same_step_may_break_twice(folder: Path) -> None:
    save(folder, 10)
    for _ in range(2):
        damage(save(folder, 20))
        assert newest(folder, OURS) == folder / "checkpoint-10"
    assert names(folder) == [".corrupt-checkpoint-20", "checkpoint-10"]


def test_few_broken_ones_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is as large as a good one. Those that were found last are kept, whatever their step."""
    for step in (40, 30, 10, 20):
        damage(save(folder, step))
        assert newest(folder, OURS) is None
    assert names(folder) == [".corrupt-checkpoint-10", ".corrupt-checkpoint-20"]
    said = capsys.readouterr().out
    assert ".corrupt-checkpoint-40 is removed: 2 newer ones lie set aside" in said
    assert ".corrupt-checkpoint-30 is removed" in said


@dataclass(frozen=True)
class AsideCase:
    saved: list[int]  # steps
    damaged: list[int]
    set_aside: list[int]  # steps


ASIDE = [
    AsideCase(
        saved=[10, 20],
        damaged=[],
        set_aside=[],
    ),
    AsideCase(
        saved=[10, 20],
        damaged=[20],
        set_aside=[20],
    ),
    AsideCase(
        saved=[10, 20],
        damaged=[10, 20],
        set_aside=[10, 20],
    ),
]


@pytest.mark.parametrize("case", ASIDE, ids=lambda case: f"{case.damaged} of {case.saved}")
def test_what_was_set_aside_can_be_counted(case: AsideCase, folder: Path) -> None:
    for step in case.saved:
        save(folder, step)
    for step in case.damaged:
        damage(folder / f"checkpoint-{step}")
    newest(folder, OURS)
    save(folder / ".staging-checkpoint-30", 30)
    assert sorted(p.name for p in checkpoint.set_aside(folder)) == [
        f".corrupt-checkpoint-{step}" for step in case.set_aside
    ]


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
        "Change it back to resume, or start over: with --fresh on a laptop, under another metadata.name on a cluster",
    )
    assert names(folder) == ["checkpoint-10"]


def staged(folder: Path, step: int, states: list[str]) -> Path:
    path = folder / f".staging-checkpoint-{step}" / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    for name in states:
        (path / name).write_bytes(b"state")
    return path


def commit(path: Path, folder: Path, ranks: int, facts: dict[str, Any]) -> Path:
    """As `loop` does it: each rank describes what it has written, rank 0 makes a checkpoint of it."""
    described = [checkpoint.describe(path, rank, ranks) for rank in range(ranks)]
    return checkpoint.commit(path, folder, described, facts)


def test_commit(folder: Path) -> None:
    path = commit(staged(folder, 7, ["rng_state_0.pth", "rng_state_1.pth"]), folder, 2, {"step": 7, **facts_of(OURS)})
    assert names(folder) == ["checkpoint-7"]
    manifest = read_manifest(path) or {}
    assert manifest["step"] == 7
    assert [entry["path"] for entry in manifest["files"]] == ["model.safetensors", "rng_state_0.pth", "rng_state_1.pth"]
    assert newest(folder, OURS) == path


def test_commit_replaces_one_of_the_same_step(folder: Path) -> None:
    damage(save(folder, 7))
    commit(staged(folder, 7, ["rng_state.pth"]), folder, 1, facts_of(OURS))
    assert newest(folder, OURS) == folder / "checkpoint-7"
    assert names(folder) == ["checkpoint-7"]


WRITERS = [
    # file                                                                rank of two
    ("rng_state_1.pth", 1),
    ("global_step7/zero_pp_rank_1_mp_rank_00_optim_states.pt", 1),
    ("global_step7/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", 1),
    ("global_step7/zero_pp_rank_0_mp_rank_00_model_states.pt", 0),
    ("global_step7/mp_rank_00_model_states.pt", 0),
    ("optimizer.pt", 0),
    ("rng_state_7.pth", 0),
]


@pytest.mark.parametrize(("file", "rank"), WRITERS, ids=[w[0] for w in WRITERS])
def test_each_rank_reads_back_what_it_wrote(file: str, rank: int, folder: Path) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"state")
    assert [[e["path"] for e in checkpoint.describe(folder, r, 2)] for r in range(2)] == (
        [[file], []] if rank == 0 else [[], [file]]
    )


def test_what_nobody_has_described_is_in_the_manifest_too(folder: Path) -> None:
    """Files that appear late, or that a name gives to a rank that did not write them."""
    path = staged(folder, 7, ["rng_state.pth"])
    (path / "late.json").write_text("{}")
    checkpoint.commit(path, folder, [[]], facts_of(OURS))
    manifest = read_manifest(folder / "checkpoint-7") or {}
    assert [entry["path"] for entry in manifest["files"]] == ["late.json", "model.safetensors", "rng_state.pth"]
    assert problems(folder / "checkpoint-7") == []


def test_what_other_pods_write_may_be_seen_a_moment_later(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = staged(folder, 7, ["rng_state_0.pth", "rng_state_1.pth"])
    described = [checkpoint.describe(path, rank, 2) for rank in (0, 1)]
    (path / "rng_state_1.pth").unlink()
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: (path / "rng_state_1.pth").write_bytes(b"state"))
    assert checkpoint.commit(path, folder, described, facts_of(OURS)) == folder / "checkpoint-7"


def test_pods_that_do_not_share_the_volume(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARED_VOLUME_SECONDS", 0.0)
    path = staged(folder, 7, ["rng_state_0.pth", "rng_state_1.pth"])
    described = [checkpoint.describe(path, rank, 2) for rank in (0, 1)]
    (path / "rng_state_1.pth").unlink()
    with pytest.raises(Failure) as caught:
        checkpoint.commit(path, folder, described, facts_of(OURS))
    assert caught.value.code == 74
    assert caught.value.message.startswith("spec.workspace: only 1 of 2 processes could be seen writing")
    assert not (folder / "checkpoint-7").exists()


def test_reading_gives_signs_of_life(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of 70B weights takes minutes: nobody may take that for a hang. Before the first step more patience is
    left.
    """
    monkeypatch.setattr("luthier_trainer.workspace.manifest.CHUNK_BYTES", 4)
    beats = []
    monkeypatch.setattr(checkpoint, "beat", lambda: beats.append(1))
    commit(staged(folder, 7, ["rng_state.pth"]), folder, 1, facts_of(OURS))
    assert len(beats) == 2 + 2 + 2  # files; chunks of `weights` and of `state`
    assert newest(folder, OURS) == folder / "checkpoint-7"
    assert [(run_dir() / name).exists() for name in (STARTING_FILE, HEARTBEAT_FILE)] == [True, False]


def test_the_ranks_share_what_is_verified() -> None:
    entries = [{"path": name, "size": size} for name, size in (("a", 1), ("b", 9), ("c", 8), ("d", 2))]
    shares = [checkpoint.share_of(entries, rank, 2) for rank in (0, 1)]
    assert [[e["path"] for e in share] for share in shares] == [["b", "d"], ["c", "a"]]


def test_the_order_of_settings_makes_no_other_run(folder: Path) -> None:
    ours = {"spec.task": "causal-lm", "spec.method": {"type": "lora", "rank": 8}}
    save(folder, 10, ours)
    assert (
        newest(folder, {"spec.method": {"rank": 8, "type": "lora"}, "spec.task": "causal-lm"})
        == folder / "checkpoint-10"
    )


def test_a_manifest_holds_what_lies_in_folders_below_and_may_be_written_anew(folder: Path) -> None:
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / "rank_0.pt").write_bytes(b"state")
    for _ in range(2):
        assert [entry["path"] for entry in write_manifest(folder)["files"]] == ["global_step7/rank_0.pt"]
        assert problems(folder) == []


def test_what_a_manifest_names_is_durable_before_it_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    (folder / "a").write_bytes(b"1")
    (folder / "b").write_bytes(b"2")
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / "c").write_bytes(b"3")
    write_manifest(folder)
    assert sorted(synced[:3]) == ["a", "b", "c"]  # by several threads
    assert synced[3:] == ["global_step7", ".MANIFEST.json.partial", folder.name]


@dataclass(frozen=True)
class RotationCase:
    saved: list[int]  # steps
    keep: int
    left: list[int]  # steps


ROTATIONS = [
    RotationCase(
        saved=[10],
        keep=2,
        left=[10],
    ),
    RotationCase(
        saved=[10, 20],
        keep=2,
        left=[10, 20],
    ),
    RotationCase(
        saved=[9, 10, 100],
        keep=2,
        left=[10, 100],
    ),
    RotationCase(
        saved=[10, 20, 30],
        keep=1,
        left=[30],
    ),
]


@pytest.mark.parametrize("case", ROTATIONS, ids=lambda case: f"{case.keep} of {case.saved}")
def test_rotate(case: RotationCase, folder: Path) -> None:
    for step in case.saved:
        save(folder, step)
    damage(save(folder / ".corrupt", 5))
    checkpoint.rotate(folder, case.keep)
    assert sorted(map(checkpoint.step_of, checkpoint.checkpoints(folder))) == case.left
