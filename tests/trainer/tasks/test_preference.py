"""Preference learning: pairs are checked, learnt from as TRL does, and a run survives as any other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quick import quick
from datasets import Dataset
from hub.server import Running
from huggingface_hub import HfApi
from peft import LoraConfig
from prepared_workspace import logged, losses, without_the_machine
from safetensors.torch import load_file
from trainer.tasks.stopping import stopped_at
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertLMHeadModel

from luthier_api.run import FineTuneRun
from luthier_api.variables import Variables
from luthier_trainer.prepare import main as prepare
from luthier_trainer.publish import main as publish
from luthier_trainer.publish.model_card import card
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.run_folder import run_dir
from luthier_trainer.tasks import kept_reference
from luthier_trainer.tasks.trl_trainer import Quiet
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared

FULL = {"type": "full"}
LORA = {"type": "lora", "rank": 4}
QLORA = {"type": "qlora", "rank": 4}
COURSE = {"maxLength": 48, "batchSize": 4, "maxSteps": 6, "learningRate": 1e-3, "logSteps": 1, "evalSteps": 3}


@pytest.fixture
def prefer(make_run: Any, tmp_path: Path, pairs: list[dict[str, str]]) -> Callable[..., FineTuneRun]:
    """The run config of a job over `rows`, 8 of whose pairs are held out."""

    def make(
        name: str = "job",
        rows: list[dict[str, Any]] | None = None,
        held_out: list[dict[str, Any]] | None = None,
        **spec: Any,
    ) -> FineTuneRun:
        given = rows or pairs
        train_file, eval_file = tmp_path / f"{name}-train.jsonl", tmp_path / f"{name}-eval.jsonl"
        train_file.write_text("".join(json.dumps(row) + "\n" for row in given[: len(given) - 8 or None]))
        eval_file.write_text("".join(json.dumps(row) + "\n" for row in held_out or pairs[-8:]))
        dataset = {"files": [str(train_file)], "evalFiles": [str(eval_file)]}
        return make_run(name, **{"task": "preference", "dataset": dataset, "method": LORA, "training": COURSE} | spec)

    return make


def test_an_adapter_on_the_head_is_refused(prefer: Callable[..., FineTuneRun]) -> None:
    with pytest.raises(Failure, match=r"spec\.method\.targetModules\[1\]: TRL reads the weights of lm_head"):
        prepare.main(prefer(method=LORA | {"targetModules": ["q_proj", "lm_head"]}))


STEPS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
}


def plain_trl(
    run: FineTuneRun, folder: Path, model_path: Path, rows: list[dict[str, Any]], held_out: list[dict[str, Any]]
) -> tuple[Any, list[dict[str, float]]]:
    """A script of TRL's documentation over the same rows: its trainer after training, and what it has logged."""
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

    spec = run.spec
    asked = spec.preference
    common = STEPS | {
        "output_dir": str(folder),
        "max_steps": spec.training.max_steps,
        "max_length": spec.training.max_length,
        "per_device_train_batch_size": spec.training.batch_size,
        "per_device_eval_batch_size": spec.training.batch_size,
        "seed": spec.training.seed,
        "beta": asked.beta,
    }
    if asked.loss_type == "kto":
        # TRL needs the rows in the order in which they are learnt.
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(spec.training.seed))
        rows = [rows[i] for i in order.tolist()]
        good = sum(row["label"] for row in rows)
        config: Any = KTOConfig(**common, undesirable_weight=good / (len(rows) - good))
    else:
        config = DPOConfig(
            **common,
            loss_type=[asked.loss_type],
            label_smoothing=asked.label_smoothing or 0.0,
            precompute_ref_log_probs=asked.precompute_reference,
        )
    adapters = LoraConfig(r=4, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = (KTOTrainer if asked.loss_type == "kto" else DPOTrainer)(
        model=AutoModelForCausalLM.from_pretrained(model_path),
        ref_model=AutoModelForCausalLM.from_pretrained(model_path) if spec.method.type == "full" else None,
        args=config,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(held_out),
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=None if spec.method.type == "full" else adapters,
    )
    trainer.train()
    return trainer, [entry for entry in trainer.state.log_history if "loss" in entry]


def rated(pairs: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Two rows of three with a good answer."""
    return [
        {"prompt": pair["prompt"], "completion": pair[("chosen", "chosen", "rejected")[i % 3]], "label": i % 3 < 2}
        for i, pair in enumerate(pairs)
    ]


@dataclass(frozen=True)
class Learning:
    name: str
    method: dict[str, Any]
    loss_type: str
    first: float | None = None
    """The loss of a model that is its reference."""
    precompute: bool = False
    label_smoothing: float | None = None


LEARNINGS = [
    Learning(name="all weights", method=FULL, loss_type="sigmoid", first=math.log(2)),
    Learning(name="all weights, reference kept", method=FULL, loss_type="sigmoid", first=math.log(2), precompute=True),
    Learning(name="adapters, reference kept", method=LORA, loss_type="sigmoid", first=math.log(2), precompute=True),
    Learning(name="adapters, robust", method=LORA, loss_type="robust", first=math.log(2), label_smoothing=0.2),
    Learning(name="adapters, hinge", method=LORA, loss_type="hinge", first=1.0),
    Learning(name="adapters, ipo", method=LORA, loss_type="ipo", first=25.0),
    Learning(name="adapters, kto", method=LORA, loss_type="kto", first=0.65),
    Learning(name="all weights, kto", method=FULL, loss_type="kto"),
]


MEASURED = {
    "evalLoss": "loss",
    "rewardAccuracy": "rewards/accuracies",
    "rewardMargin": "rewards/margins",
    "rewardChosen": "rewards/chosen",
    "rewardRejected": "rewards/rejected",
    "kl": "kl",
}
"""Metric → its name in TRL."""


@pytest.mark.parametrize("case", quick(LEARNINGS, "all weights", "adapters, ipo", "adapters, kto"))
def test_losses_and_rewards_are_those_of_trl(
    case: Learning,
    prefer: Callable[..., FineTuneRun],
    pairs: list[dict[str, str]],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    rows, held_out = pairs[:-8], pairs[-8:]
    training = COURSE
    if case.loss_type == "kto":
        rows, held_out = rated(rows), rated(held_out)
        training = COURSE | {"batchSize": 8, "maxSteps": 2, "evalSteps": 1, "maxLength": 96}
    preference = {
        "lossType": case.loss_type,
        "precomputeReference": case.precompute,
        "labelSmoothing": case.label_smoothing,
    }
    run = prefer(
        rows=[*rows, *held_out], held_out=held_out, method=case.method, preference=preference, training=training
    )
    prepare.main(run)
    metrics = train.main(run).metrics
    assert metrics is not None
    trainer, expect = plain_trl(run, tmp_path / "trl", tiny_model, rows, held_out)
    found = logged(run)
    for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        values = [entry[name] for entry in expect if name in entry]
        assert [entry[name] for entry in found if name in entry] == pytest.approx(values, abs=1e-5), name
    assert metrics["evalLoss"] < metrics["evalLossBefore"]
    measured = trainer.evaluate()
    for name, theirs in MEASURED.items():
        if f"eval_{theirs}" in measured:
            assert metrics[name] == pytest.approx(measured[f"eval_{theirs}"], abs=1e-5), name
    if case.first is not None:
        assert metrics["evalLossBefore"] == pytest.approx(case.first, abs=1e-4)


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto"])
def test_the_dropout_of_adapters_takes_effect(
    loss_type: str, prefer: Callable[..., FineTuneRun], pairs: list[dict[str, str]]
) -> None:
    """From the second step on: the adapter's output is 0 in the first one. TRL would switch this dropout off."""
    training = COURSE | {"maxSteps": 2, "batchSize": 4, "evalSteps": None, "logSteps": 1}
    found = []
    for dropout in (0.0, 0.5):
        method = LORA | {"dropout": dropout}
        run = prefer(f"job-{dropout}", method=method, preference={"lossType": loss_type}, training=training)
        prepare.main(run)
        train.main(run)
        found.append(losses(run))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert abs(found[0][1] - found[1][1]) > 1e-5


@dataclass(frozen=True)
class Stopping:
    name: str
    method: dict[str, Any]
    preference: dict[str, Any] = field(default_factory=dict)


STOPPINGS = [
    Stopping(name="all weights", method=FULL),
    Stopping(name="adapters", method=LORA | {"dropout": 0.1}),
    Stopping(name="adapters on a quantised model", method=QLORA),
    Stopping(name="all weights, kto", method=FULL, preference={"lossType": "kto"}),
    Stopping(name="adapters, kto", method=LORA, preference={"lossType": "kto"}),
    Stopping(name="adapters on a quantised model, kto", method=QLORA, preference={"lossType": "kto"}),
    Stopping(name="all weights, reference kept", method=FULL, preference={"precomputeReference": True}),
]


@pytest.mark.parametrize("case", quick(STOPPINGS, "adapters", "all weights, kto"))
def test_a_stopped_run_goes_on_to_the_last_bit(
    case: Stopping,
    prefer: Callable[..., FineTuneRun],
    pairs: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    wide_model: Path,
) -> None:
    """Both files of pairs are taken apart for KTO."""
    spec = {"method": case.method, "preference": case.preference, "model": {"path": str(wide_model)}}
    runs = [prefer(name, rows=pairs, **spec) for name in ("whole", "stopped")]
    for run in runs:
        prepare.main(run)
    train.main(runs[0])
    message = stopped_at(runs[1], 3, monkeypatch)
    assert (message.code, message.step, message.saved) == (75, 3, True)
    if case.preference.get("precomputeReference"):
        monkeypatch.setattr("luthier_trainer.tasks.dpo.PreferenceTrainer._reference_of", None)  # nothing is left to do
    train.main(runs[1])
    assert losses(runs[1]) == losses(runs[0])
    results = [Path(run.workspace) / "result" for run in runs]
    for file in results[0].glob("*.safetensors"):
        other = load_file(results[1] / file.name)
        for name, tensor in load_file(file).items():
            assert tensor.equal(other[name]), name
    metrics = [json.loads((result / "metrics.json").read_text()) for result in results]
    assert without_the_machine(metrics[0]) == without_the_machine(metrics[1])


def test_what_is_known_of_the_reference_is_not_computed_again(
    prefer: Callable[..., FineTuneRun], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is stopped after the first batches computes only the others, and learns as one that was not."""
    spec = {"preference": {"precomputeReference": True}, "training": COURSE | {"maxSteps": 2}}
    runs = [prefer(name, **spec) for name in ("whole", "stopped")]
    for run in runs:
        prepare.main(run)
    monkeypatch.setattr(kept_reference, "BATCHES_AT_ONCE", 2)
    train.main(runs[0])
    (run_dir() / "stop").touch()
    assert train.main(runs[1]).code == 75
    (run_dir() / "stop").unlink()
    capsys.readouterr()
    train.main(runs[1])
    log = capsys.readouterr().out
    assert "reference: 8 of 16 rows of train are kept from before\nreference: 16 of 16 rows of train\n" in log
    assert losses(runs[1]) == losses(runs[0])


@pytest.fixture(scope="module")
def wide_model(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose widths bitsandbytes can quantise on CPU."""
    from luthier_api.spec import NewModel
    from luthier_trainer.models.new_model import new_config, save_new_model
    from luthier_trainer.models.new_tokenizer import train_tokenizer

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


class Places:
    """A trainer that moves the model to its device, as transformers' does it where there is a GPU."""

    def __init__(self, *, model: torch.nn.Module) -> None:
        model.to("meta")


class QuietlyPlaced(Quiet, Places):
    pass


def test_weights_stay_where_the_trainer_has_placed_them() -> None:
    """They were moved back to the CPU before, where every GPU training with TRL's trainers then failed."""
    model = torch.nn.Linear(2, 2)
    QuietlyPlaced(model=model)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}
