"""What checkpoints and results take: the sums against files that a training has written, and what is said where they do
not fit.

`test_ranks` compares those of ZeRO-2 and ZeRO-3, whose files several processes write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import pytest
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from prepared_workspace import prepared_run
from trainer.conftest import MakeRun
from trainer.volumes import mounted
from transformers import AutoConfig, BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from luthier_api.generate import GenerateJobSpec
from luthier_api.method import Method
from luthier_api.run import Weights
from luthier_api.task_settings import ImageSettings
from luthier_api.tasks import GENERATION_TASKS
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.methods import trainable
from luthier_trainer.models.inspect import skeleton
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import checkpoint
from luthier_trainer.training import main as train
from luthier_trainer.workspace import space
from luthier_trainer.workspace.plan import plan_space
from luthier_trainer.workspace.prepared import read_prepared


@pytest.fixture(scope="module")
def data(prose_data: DatasetDict) -> DatasetDict:
    return DatasetDict(train=prose_data["train"])


METHODS = [{"type": "full"}, {"type": "lora", "rank": 64}]


@pytest.mark.parametrize("method", METHODS, ids=[m["type"] for m in METHODS])
def test_a_training_writes_what_was_foreseen(
    method: dict[str, Any], tmp_path: Path, llama: Path, data: DatasetDict
) -> None:
    run = prepared_run(tmp_path / "job", llama, data, method=method, training={"maxSteps": 1})
    folder = WorkspaceFolder(tmp_path / "job")
    plan = read_prepared(run).plan
    weights = trainable.weights_of(AutoConfig.from_pretrained(llama), run.spec, plan, llama)
    plan = plan_space(plan, weights, space.folder_bytes(folder.prepared / "processor"))
    train.main(run)
    assert space.folder_bytes(folder.checkpoints / "checkpoint-1") == pytest.approx(plan.checkpoint_bytes, rel=0.05)
    assert space.folder_bytes(folder.result) == pytest.approx(plan.result_bytes, rel=0.05)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}


@dataclass(frozen=True)
class AdapterCase:
    name: str
    config: PreTrainedConfig
    task: str
    targets: list[str]
    method: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    """The same for PEFT."""


ADAPTERS = [
    AdapterCase(
        name="DoRA, of other ranks",
        config=LlamaConfig(**SMALL),
        task="causal-lm",
        targets=["all-linear"],
        method={"dora": True, "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 2}},
        plain={"use_dora": True, "rank_pattern": {"q_proj": 8, r"layers\.1\.mlp\..*": 2}},
    ),
    AdapterCase(
        name="of one layer",
        config=LlamaConfig(**SMALL),
        task="causal-lm",
        targets=["q_proj", "embed_tokens"],
        method={"layers": [1]},
        plain={"layers_to_transform": [1]},
    ),
    AdapterCase(
        name="by a regular expression",
        config=LlamaConfig(**SMALL),
        task="causal-lm",
        targets=[r".*\.1\..*"],
        plain={"target_modules": r".*\.1\..*_proj"},
    ),
    AdapterCase(
        name="beside modules trained whole",
        config=LlamaConfig(**SMALL),
        task="causal-lm",
        targets=["q_proj", "v_proj"],
        method={"modules_to_save": ["embed_tokens", "1.mlp"]},
        plain={"modules_to_save": ["embed_tokens", "1.mlp"]},
    ),
    AdapterCase(
        name="all linear modules",
        config=LlamaConfig(**SMALL),
        task="causal-lm",
        targets=["all-linear"],
    ),
    AdapterCase(
        name="some",
        config=LlamaConfig(**SMALL),
        task="causal-lm",
        targets=["q_proj", "down_proj"],
    ),
    AdapterCase(
        name="embeddings",
        config=LlamaConfig(**SMALL),
        task="causal-lm",
        targets=["embed_tokens", "q_proj"],
    ),
    AdapterCase(
        name="GPT-2, which has Conv1D",
        config=GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99),
        task="causal-lm",
        targets=["all-linear"],
    ),
    AdapterCase(
        name="beside a head trained whole",
        config=BertConfig(**SMALL),
        task="text-classification",
        targets=["all-linear"],
    ),
]


@pytest.mark.parametrize("case", ADAPTERS, ids=lambda case: case.name)
def test_weights_that_learn_are_those_that_peft_makes(case: AdapterCase) -> None:
    whole = ["classifier"] if case.task == "text-classification" else []
    counted = trainable.adapter_tensors(
        skeleton(case.config, case.task, ""), Method(rank=4, target_modules=case.targets, **case.method), whole
    )
    made = get_peft_model(
        skeleton(case.config, case.task, ""),
        LoraConfig(
            r=4,
            **{"target_modules": "all-linear" if case.targets == ["all-linear"] else case.targets} | case.plain,
            **({"modules_to_save": whole, "exclude_modules": whole} if whole else {}),
        ),
    )
    learning = [p for p in made.parameters() if p.requires_grad]
    # A module that keeps its weight as [inputs, outputs] swaps the shapes of its matrices.
    assert sorted(sorted(tensor.shape) for tensor in counted) == sorted(sorted(weight.shape) for weight in learning)


def full(total: float) -> Weights:
    return weights(total, total, tensors=300, adapters=False)


def lora(total: float, learning: float) -> Weights:
    return weights(total, learning, tensors=450, adapters=True)


def weights(total: float, learning: float, tensors: int, adapters: bool) -> Weights:
    """With the state of AdamW."""
    return Weights(
        total=int(total),
        learning=int(learning),
        tensors=tensors,
        state_bytes=8 * int(learning),
        adapters=adapters,
        computed_bytes=2,
        source_bytes=2,
    )


@dataclass(frozen=True)
class LargeCase:
    name: str
    weights: Weights
    strategy: str
    ranks: int
    checkpoint_gb: float
    result_gb: float
    save_seconds: int
    grace_seconds: int


LARGE = [
    LargeCase(
        name="2.5B full, alone",
        weights=full(2.5e9),
        strategy="none",
        ranks=1,
        checkpoint_gb=30.0,
        result_gb=5.0,
        save_seconds=181,
        grace_seconds=312,
    ),
    LargeCase(
        name="14B full, ZeRO-3",
        weights=full(14e9),
        strategy="zero3",
        ranks=8,
        checkpoint_gb=168.0,
        result_gb=28.0,
        save_seconds=862,
        grace_seconds=1333,
    ),
    LargeCase(
        name="70B full, ZeRO-3",
        weights=full(70e9),
        strategy="zero3",
        ranks=64,
        checkpoint_gb=840.0,
        result_gb=140.0,
        save_seconds=4214,
        grace_seconds=6361,
    ),
    LargeCase(
        name="7B full, ZeRO-2",
        weights=full(7e9),
        strategy="zero2",
        ranks=8,
        checkpoint_gb=98.0,
        result_gb=14.0,
        save_seconds=503,
        grace_seconds=795,
    ),
    LargeCase(
        name="7B LoRA, DDP",
        weights=lora(7e9, 40e6),
        strategy="ddp",
        ranks=8,
        checkpoint_gb=0.5,
        result_gb=0.2,
        save_seconds=3,
        grace_seconds=45,
    ),
]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_models(case: LargeCase) -> None:
    found = space.checkpoint_bytes(case.weights, case.strategy, case.ranks, processor_bytes=0)
    seconds = space.save_seconds(found, case.ranks)
    assert (round(found / 1e9, 1), round(space.result_bytes(case.weights, case.strategy, 0) / 1e9, 1)) == (
        case.checkpoint_gb,
        case.result_gb,
    )
    assert (seconds, space.grace_seconds(seconds)) == (case.save_seconds, case.grace_seconds)


@dataclass(frozen=True)
class CopiesCase:
    name: str
    training: dict[str, Any]
    steps: int
    copies: int


COPIES = [
    CopiesCase(
        name="those that are kept, and one in the making",
        training={"saveSteps": 10, "keepCheckpoints": 2},
        steps=100,
        copies=3,
    ),
    CopiesCase(
        name="that of the last step",
        training={"saveSteps": 1000},
        steps=100,
        copies=1,
    ),
    CopiesCase(
        name="two",
        training={"saveSteps": 10},
        steps=15,
        copies=2,
    ),
    CopiesCase(
        name="one an epoch",
        training={"saveEvery": "epoch", "epochs": 1.5, "keepCheckpoints": 9},
        steps=15,
        copies=2,
    ),
    CopiesCase(
        name="the best one beside them",
        training={"saveSteps": 10, "loadBestModel": True, "evalSteps": 10},
        steps=100,
        copies=4,
    ),
]


@pytest.mark.parametrize("case", COPIES, ids=lambda case: case.name)
def test_no_more_checkpoints_are_counted_than_there_will_be(case: CopiesCase, make_run: MakeRun) -> None:
    assert space.copies(make_run(training={"maxLength": 64} | case.training).spec.training, case.steps) == case.copies


def test_a_volume_that_is_too_small_is_refused_before_the_training(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(
        method={"type": "full"},
        training={"maxLength": 64, "batchSize": 4, "maxSteps": 90, "saveSteps": 1, "keepCheckpoints": 40},
    )
    with mounted(Path(run.workspace), kibibytes=8 << 10), pytest.raises(Failure) as caught:
        prepare.main(run)
    assert caught.value.code == 74
    assert caught.value.message.startswith("spec.workspace.size: 41 checkpoints of ")
    assert "Enlarge its claim to 1Gi, lower training.keepCheckpoints" in caught.value.message


@pytest.mark.parametrize("chosen", [None, range(0, 900, 3)], ids=["all rows", "a third of them"])
def test_the_bytes_of_saved_rows(chosen: range | None, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"input_ids": [[n] * 100 for n in range(900)]})
    rows = rows if chosen is None else rows.select(chosen)
    rows.save_to_disk(tmp_path / "rows")
    assert space.rows_bytes(rows) == pytest.approx(space.folder_bytes(tmp_path / "rows"), rel=0.05)


def test_encoded_rows_that_do_not_fit_are_refused_before_they_are_saved(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(training={"maxLength": 64, "maxSteps": 1})
    monkeypatch.setattr(space, "volume", lambda folder: (100, 5 << 30))
    with pytest.raises(
        Failure, match=r"^spec\.workspace\.size: the encoded rows need .* Enlarge its claim to 6Gi"
    ) as caught:
        prepare.main(run)
    assert caught.value.code == 74
    assert not (Path(run.workspace) / "prepared/dataset").exists()


def test_before_a_save_broken_checkpoints_make_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mounted(tmp_path / "checkpoints", kibibytes=4 << 10) as folder:
        broken = folder / ".corrupt-checkpoint-1"
        broken.mkdir()
        (broken / "model.safetensors").write_bytes(b"x" * (3 << 20))
        checkpoint.make_room(folder, 1 << 19)
        assert broken.exists()
        checkpoint.make_room(folder, 2 << 20)
        assert not broken.exists()
        assert ".corrupt-checkpoint-1 is removed: the volume has no room" in capsys.readouterr().out
        with pytest.raises(
            Failure,
            match=(
                r"^spec\.workspace\.size: the next checkpoint needs 8\.4 MB, and 4\.2 MB of the volume's 4\.2 MB are"
                r" free"
            ),
        ) as caught:
            checkpoint.make_room(folder, 8 << 20)
        assert caught.value.code == 74


@dataclass(frozen=True)
class OutputCase:
    name: str
    spec: dict[str, Any]
    least: int
    most: int


LINES = 1000 * space.LINE_BYTES + 50_000
OUTPUTS = [
    OutputCase(
        name="texts",
        spec={"task": "text-generation", "text": {"maxNewTokens": 100}},
        least=LINES,
        most=LINES + 1000 * 100 * space.TOKEN_BYTES,
    ),
    OutputCase(
        name="several texts of a row",
        spec={"task": "text-generation", "text": {"maxNewTokens": 100, "perPrompt": 3, "temperature": 1.0}},
        least=3 * LINES,
        most=3 * (LINES + 1000 * 100 * space.TOKEN_BYTES),
    ),
    OutputCase(
        name="images",
        spec={"task": "text-to-image", "image": {"width": 512, "height": 1024}},
        least=LINES + 1000 * 512 * 1024 // 2,
        most=LINES + 2 * 1000 * 512 * 1024,
    ),
]


@pytest.mark.parametrize("case", OUTPUTS, ids=lambda case: case.name)
def test_what_outputs_take(case: OutputCase) -> None:
    base = {"model": {"id": "a/b"}, "inputs": {"rows": [{"prompt": "a lute"}]}}
    spec = GenerateJobSpec.model_validate(base | case.spec)
    outputs = 1000 * spec.per_prompt
    found = space.outputs_bytes(spec, outputs, 50_000 * spec.per_prompt)
    assert found == space.OutputBytes(case.least, case.most)


def test_each_task_and_format_of_images_has_its_bytes() -> None:
    assert {task.settings for task in GENERATION_TASKS.values()} == set(space.OUTPUTS)
    assert set(get_args(ImageSettings.model_fields["format"].annotation)) == set(space.PIXEL_BYTES)


def test_outputs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    given = {"model": {"id": "a/b"}, "inputs": {"rows": [{"prompt": "a lute"}]}}
    spec = GenerateJobSpec.model_validate(given | {"task": "text-to-image"})
    with mounted(tmp_path / "full", kibibytes=4 << 10) as folder:
        space.check_outputs(space.outputs_bytes(spec, 1, 100), 1, folder)
        assert notices.given() == []
        space.check_outputs(space.outputs_bytes(spec, 4, 100), 4, folder)
        (notice,) = notices.given()
        assert notice.startswith(
            "spec.workspace.size: 4 outputs may take up to 8.4 MB, and 4.2 MB of the volume's 4.2 MB"
        )
        with pytest.raises(Failure, match=r"spec\.workspace\.size: 10 outputs need at least 5\.2 MB, and 4\.2 MB of"):
            space.check_outputs(space.outputs_bytes(spec, 10, 100), 10, folder)
