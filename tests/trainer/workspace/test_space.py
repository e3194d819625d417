"""What checkpoints and results take: the sums against files that a training has written, and what is said where they do
not fit.

`test_ranks` compares those of ZeRO-2 and ZeRO-3, whose files several processes write.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import DatasetDict
from peft import LoraConfig, get_peft_model
from prepared_workspace import causal_lm_data, prepared_run, prose, save_llama
from trainer.conftest import MakeRun
from trainer.volumes import mounted
from transformers import AutoConfig, AutoTokenizer, BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from luthier_api.finetune import Method
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.methods import trainable
from luthier_trainer.models.inspect import skeleton
from luthier_trainer.prepare import main as prepare
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import checkpoint
from luthier_trainer.training import main as train
from luthier_trainer.training.utilisation import count_weights
from luthier_trainer.workspace import space
from luthier_trainer.workspace.plan import plan_space
from luthier_trainer.workspace.prepared import read_prepared
from luthier_trainer.workspace.space import Weights


@pytest.fixture(scope="module")
def llama(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), paragraphs)


@pytest.fixture(scope="module")
def data(llama: Path, paragraphs: list[str]) -> DatasetDict:
    return DatasetDict(train=causal_lm_data(AutoTokenizer.from_pretrained(llama), prose(paragraphs))["train"])


METHODS = [{"type": "full"}, {"type": "lora", "rank": 64}]


@pytest.mark.parametrize("method", METHODS, ids=[m["type"] for m in METHODS])
def test_a_training_writes_what_was_foreseen(
    method: dict[str, Any], tmp_path: Path, llama: Path, data: DatasetDict
) -> None:
    run = prepared_run(tmp_path / "job", llama, data, method=method, training={"maxSteps": 1})
    folder = WorkspaceFolder(tmp_path / "job")
    plan = read_prepared(run).plan
    weights = trainable.weights_of(AutoConfig.from_pretrained(llama), run.spec, plan, None, llama)
    plan = plan_space(plan, weights, space.folder_bytes(folder.prepared / "processor"))
    train.main(run)
    assert space.folder_bytes(folder.checkpoints / "checkpoint-1") == pytest.approx(plan.checkpoint_bytes, rel=0.05)
    assert space.folder_bytes(folder.result) == pytest.approx(plan.result_bytes, rel=0.05)


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 99}
ADAPTERS: list[tuple[str, PreTrainedConfig, str, list[str]]] = [
    ("all linear modules", LlamaConfig(**SMALL), "causal-lm", ["all-linear"]),
    ("some", LlamaConfig(**SMALL), "causal-lm", ["q_proj", "down_proj"]),
    ("embeddings", LlamaConfig(**SMALL), "causal-lm", ["embed_tokens", "q_proj"]),
    ("GPT-2, which has Conv1D", GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99), "causal-lm", ["all-linear"]),
    ("beside a head trained whole", BertConfig(**SMALL), "text-classification", ["all-linear"]),
]


@pytest.mark.parametrize(("name", "config", "task", "targets"), ADAPTERS, ids=[a[0] for a in ADAPTERS])
def test_weights_that_learn_are_those_that_peft_makes(
    name: str, config: PreTrainedConfig, task: str, targets: list[str]
) -> None:
    whole = ["classifier"] if task == "text-classification" else []
    counted = trainable.adapter_sizes(skeleton(config, task, ""), Method(rank=4, target_modules=targets), whole)
    made = get_peft_model(
        skeleton(config, task, ""),
        LoraConfig(
            r=4,
            target_modules=targets if targets != ["all-linear"] else "all-linear",
            modules_to_save=whole or None,
            exclude_modules=whole or None,
        ),
    )
    learning = [p for p in made.parameters() if p.requires_grad]
    assert (sum(counted), len(counted)) == (count_weights(learning)[0], len(learning))


def full(total: float) -> Weights:
    return Weights(total=int(total), learning=int(total), tensors=300, adapters=False, computed_bytes=2, source_bytes=2)


def lora(total: float, learning: float) -> Weights:
    return Weights(
        total=int(total), learning=int(learning), tensors=450, adapters=True, computed_bytes=2, source_bytes=2
    )


LARGE = [
    # weights, strategy, processes                        checkpoint  result   saved in  grace
    ("2.5B full, alone", full(2.5e9), "none", 1, 30.0, 5.0, 181, 312),
    ("14B full, ZeRO-3", full(14e9), "zero3", 8, 168.0, 28.0, 862, 1333),
    ("70B full, ZeRO-3", full(70e9), "zero3", 64, 840.0, 140.0, 4214, 6361),
    ("7B full, ZeRO-2", full(7e9), "zero2", 8, 98.0, 14.0, 503, 795),
    ("7B LoRA, DDP", lora(7e9, 40e6), "ddp", 8, 0.5, 0.2, 3, 45),
]


@pytest.mark.parametrize(
    ("name", "weights", "strategy", "ranks", "size", "result", "saving", "grace"), LARGE, ids=[c[0] for c in LARGE]
)
def test_large_models(
    name: str, weights: Weights, strategy: str, ranks: int, size: float, result: float, saving: int, grace: int
) -> None:
    found = space.checkpoint_bytes(weights, strategy, ranks, processor_bytes=0)
    seconds = space.save_seconds(found, ranks)
    assert (round(found / 1e9, 1), round(space.result_bytes(weights, strategy, 0) / 1e9, 1)) == (size, result)
    assert (seconds, space.grace_seconds(seconds)) == (saving, grace)


COPIES = [
    # steps  saved every  kept   at once
    (100, 10, 2, 3),
    (100, 1000, 2, 1),
    (15, 10, 2, 2),
]


@pytest.mark.parametrize(("steps", "every", "keep", "expect"), COPIES)
def test_no_more_checkpoints_are_counted_than_there_will_be(steps: int, every: int, keep: int, expect: int) -> None:
    assert space.copies(steps, every, keep) == expect


def test_a_volume_that_is_too_small_is_refused_before_the_training(tmp_path: Path, make_run: MakeRun) -> None:
    run = make_run(
        method={"type": "full"},
        training={"maxLength": 64, "batchSize": 4, "maxSteps": 90, "saveSteps": 1, "keepCheckpoints": 40},
    )
    with mounted(Path(run.workspace), kibibytes=8 << 10), pytest.raises(Failure) as caught:
        prepare.main(run)
    assert caught.value.code == 74
    assert caught.value.message.startswith("spec.workspace.size: 41 checkpoints of ")
    assert "A volume of 1Gi would do; or lower training.keepCheckpoints" in caught.value.message


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
