"""Preference learning: pairs are checked, learnt from as TRL does, and a run survives as any other."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hub.server import Running
from huggingface_hub import HfApi
from peft import LoraConfig
from prepared_workspace import losses
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from luthier_api.run import FineTuneRun
from luthier_api.termination import TerminationMessage
from luthier_api.variables import Variables
from luthier_trainer.prepare import main as prepare
from luthier_trainer.publish import main as publish
from luthier_trainer.publish.model_card import card
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.training import main as train
from luthier_trainer.training.callbacks import Heartbeat
from luthier_trainer.workspace.prepared import read_prepared

FULL = {"type": "full"}
LORA = {"type": "lora", "rank": 4}
COURSE = {"maxLength": 48, "batchSize": 4, "maxSteps": 6, "learningRate": 1e-3, "logSteps": 1, "evalSteps": 3}


@pytest.fixture
def prefer(make_run: Any, tmp_path: Path, pairs: list[dict[str, str]]) -> Callable[..., FineTuneRun]:
    """The run config of a job over `rows`, 8 of whose pairs are held out."""

    def make(name: str = "job", rows: list[dict[str, Any]] | None = None, **spec: Any) -> FineTuneRun:
        given = rows or pairs
        train_file, eval_file = tmp_path / f"{name}-train.jsonl", tmp_path / f"{name}-eval.jsonl"
        train_file.write_text("".join(json.dumps(row) + "\n" for row in given[: len(given) - 8 or None]))
        eval_file.write_text("".join(json.dumps(row) + "\n" for row in pairs[-8:]))
        dataset = {"files": [str(train_file)], "evalFiles": [str(eval_file)]}
        return make_run(name, **{"task": "preference", "dataset": dataset, "method": LORA, "training": COURSE} | spec)

    return make


def test_an_adapter_on_the_head_is_refused(prefer: Callable[..., FineTuneRun]) -> None:
    with pytest.raises(Failure, match=r"spec\.method\.targetModules\[1\]: TRL reads the weights of lm_head"):
        prepare.main(prefer(method=LORA | {"targetModules": ["q_proj", "lm_head"]}))


def plain_trl(run: FineTuneRun, folder: Path, model_path: Path, pairs: list[dict[str, str]]) -> tuple[Any, list[float]]:
    """A script of TRL's documentation over the same rows: its trainer after training, and its losses."""
    from trl import DPOConfig, DPOTrainer

    spec = run.spec
    config = DPOConfig(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        max_length=48,
        beta=spec.preference.beta,
        loss_type=[spec.preference.loss_type],
        seed=spec.training.seed,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    adapters = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        ref_model=AutoModelForCausalLM.from_pretrained(model_path) if spec.method.type == "full" else None,
        args=config,
        train_dataset=Dataset.from_list(pairs[:-8]),
        eval_dataset=Dataset.from_list(pairs[-8:]),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=None if spec.method.type == "full" else adapters,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@dataclass(frozen=True)
class Learning:
    name: str
    method: dict[str, Any]
    loss_type: str


LEARNINGS = [
    Learning(name="all weights", method=FULL, loss_type="sigmoid"),
    Learning(name="adapters", method=LORA, loss_type="sigmoid"),
    Learning(name="adapters, hinge", method=LORA, loss_type="hinge"),
    Learning(name="adapters, ipo", method=LORA, loss_type="ipo"),
]


@pytest.mark.parametrize("case", LEARNINGS, ids=lambda case: case.name)
def test_losses_and_rewards_are_those_of_trl(
    case: Learning,
    prefer: Callable[..., FineTuneRun],
    pairs: list[dict[str, str]],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    run = prefer(method=case.method, preference={"lossType": case.loss_type})
    prepare.main(run)
    metrics = train.main(run).metrics
    assert metrics is not None
    trainer, expect = plain_trl(run, tmp_path / "trl", tiny_model, pairs)
    assert losses(run) == pytest.approx(expect, abs=1e-5)
    assert expect[-1] < expect[0]
    measured = trainer.evaluate()
    assert metrics["evalLoss"] == pytest.approx(measured["eval_loss"], abs=1e-5)
    assert metrics["rewardAccuracy"] == pytest.approx(measured["eval_rewards/accuracies"])
    assert metrics["rewardMargin"] == pytest.approx(measured["eval_rewards/margins"], abs=1e-5)
    if case.loss_type == "sigmoid":
        assert metrics["evalLossBefore"] == pytest.approx(0.693147, abs=1e-5)  # ln 2: both models are the same


def stopped_at(run: FineTuneRun, step: int, monkeypatch: pytest.MonkeyPatch) -> TerminationMessage:
    """Train until the stop flag appears, as the supervisor would set it, in the middle of `step`."""

    class Flag(Heartbeat):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == step - 1:
                (run_dir() / "stop").touch()

    with monkeypatch.context() as patch:
        patch.setattr(train, "Heartbeat", Flag)
        message = train.main(run)
    (run_dir() / "stop").unlink()
    return message


METHODS = [FULL, LORA | {"dropout": 0.1}, {"type": "qlora", "rank": 4}]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_a_stopped_run_goes_on_to_the_last_bit(
    method: dict[str, Any], prefer: Callable[..., FineTuneRun], monkeypatch: pytest.MonkeyPatch, wide_model: Path
) -> None:
    runs = [prefer(name, method=method, model={"path": str(wide_model)}) for name in ("whole", "stopped")]
    for run in runs:
        prepare.main(run)
    train.main(runs[0])
    message = stopped_at(runs[1], 3, monkeypatch)
    assert (message.code, message.step, message.saved) == (75, 3, True)
    train.main(runs[1])
    assert losses(runs[1]) == losses(runs[0])
    results = [Path(run.workspace) / "result" for run in runs]
    for file in results[0].glob("*.safetensors"):
        other = load_file(results[1] / file.name)
        for name, tensor in load_file(file).items():
            assert tensor.equal(other[name]), name
    metrics = [json.loads((result / "metrics.json").read_text()) for result in results]
    for found in metrics:
        del found["seconds"]
    assert metrics[0] == metrics[1]


@pytest.fixture(scope="module")
def wide_model(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths bitsandbytes can quantise on CPU."""
    from luthier_api.spec import NewModel
    from luthier_trainer.models.new_model import new_config, save_new_model, train_tokenizer

    folder = tmp_path_factory.mktemp("wide")
    tokenizer = train_tokenizer(paragraphs[:250], 512)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    new = NewModel(model_type="llama", vocab_size=512, parameters=sizes)
    save_new_model(new_config(new, tokenizer), folder, seed=1)
    return folder


def test_a_head_that_trl_cannot_read_is_refused(
    prefer: Callable[..., FineTuneRun], tiny_model: Path, tmp_path: Path
) -> None:
    """BERT's decoders have a layer between the last hidden state and the head's weights."""
    tokenizer, path = AutoTokenizer.from_pretrained(tiny_model), tmp_path / "bert"
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), is_decoder=True, **sizes)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    run = prefer(model={"path": str(path)}, method=FULL)
    prepare.main(run)
    with pytest.raises(Failure, match=r"^spec\.model: TRL cannot read log-probabilities from a bert"):
        train.main(run)


def test_the_card_names_the_method(prefer: Callable[..., FineTuneRun]) -> None:
    run = prefer(training=COURSE | {"maxSteps": 1, "evalSteps": None})
    prepare.main(run)
    train.main(run)
    text = card(run, read_prepared(run), Path(run.workspace) / "result")
    for expected in ("- dpo", "- preference", "| Task | preference |", "| lossType | sigmoid |"):
        assert expected in text
    assert "AutoPeftModelForCausalLM" in text
    assert "Share of pairs whose chosen answer has the higher reward" in text


def test_the_result_is_published(
    prefer: Callable[..., FineTuneRun], hub: Running, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(Variables.TOKEN, "hf_writer")
    target = {"repo": "luthier/preference", "tokenSecretRef": {"name": "hf"}}
    run = prefer(hub=target, training=COURSE | {"maxSteps": 2, "evalSteps": 2})
    prepare.main(run)
    train.main(run)
    status = publish.main(run).hub
    assert status is not None
    copy = Path(HfApi(endpoint=hub.url, token="hf_writer").snapshot_download(status.repo, local_dir=tmp_path / "copy"))
    result = Path(run.workspace) / "result"
    published, delivered = (load_file(folder / "adapter_model.safetensors") for folder in (copy, result))
    assert published.keys() == delivered.keys()
    assert all(published[name].equal(delivered[name]) for name in delivered)
    assert "- dpo" in (copy / "README.md").read_text()
