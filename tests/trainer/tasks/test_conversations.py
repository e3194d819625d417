"""A training on conversations, from the manifest to the result, against TRL's trainer alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, load_from_disk
from peft import PeftModel
from prepared_workspace import losses
from trainer.generating import generate_shards, result_lines
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from luthier_api.run import FineTuneRun
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data.templates import TEMPLATES
from luthier_trainer.prepare import main as prepare
from luthier_trainer.prepare.first_row import FILE
from luthier_trainer.training import main as train
from luthier_trainer.workspace.prepared import read_prepared

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
COURSE = {
    "maxLength": 128,
    "batchSize": 4,
    "microBatchSize": 2,
    "maxSteps": 2,
    "learningRate": 1e-3,
    "logSteps": 1,
    "saveSteps": 1,
}
CHATS = [
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": f"What is a {word}?"},
        {"role": "assistant", "content": f"A {word} is a kind of object."},
        {"role": "user", "content": "Thanks"},
        {"role": "assistant", "content": answer},
    ]
    for word, answer in [("class", "You are welcome."), ("list", "Sure."), ("number", "Any time!"), ("name", "Yes.")]
]
PAIRS = [
    {"prompt": f"What is a {word}?", "completion": f" A {word} is an object."} for word in ["class", "list", "name"]
]
FORMS: dict[str, list[dict[str, Any]]] = {
    "messages": [{"messages": chat} for chat in CHATS],
    "prompt-completion": [*PAIRS, {"prompt": "And a very long question about objects?", "completion": " No."}],
}


@pytest.fixture
def tune(make_run: Any, tmp_path: Path) -> Callable[..., FineTuneRun]:
    """The run config of a job over rows in a file."""

    def make(name: str, rows: list[Any], **spec: Any) -> FineTuneRun:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = {"files": [str(path)]} | spec.pop("dataset", {})
        return make_run(name, **{"dataset": dataset, "method": {"type": "full"}, "training": COURSE} | spec)

    return make


def of_trl(run: FineTuneRun, rows: list[Any], model: Path, template: str, folder: Path) -> list[float]:
    """The losses of TRL's trainer on the same rows, all of them in each step."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(model),
        SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=2,
            learning_rate=1e-3,
            lr_scheduler_type="linear",
            logging_steps=1,
            max_length=128,
            assistant_only_loss="messages" in rows[0],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            seed=run.spec.training.seed,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("form", FORMS)
def test_the_losses_are_those_of_trl(form: str, tune: Any, tiny_model: Path, tmp_path: Path) -> None:
    named = {"chatTemplate": {"name": "zephyr"}} if form == "messages" else {}
    run = tune(form, FORMS[form], dataset=named)
    prepare.main(run)
    train.main(run)
    expect = of_trl(run, FORMS[form], tiny_model, TEMPLATES["zephyr"], tmp_path / "trl")
    assert losses(run) == pytest.approx(expect, rel=1e-4)
    assert losses(run)[1] < losses(run)[0]


def test_the_result_has_the_template_and_the_first_row_is_shown(tune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = tune(
        "job", FORMS["messages"], dataset={"chatTemplate": {"name": "zephyr"}}, method={"type": "lora", "rank": 4}
    )
    prepare.main(run)
    shown = (
        "<|system|>\nAnswer briefly.<|endoftext|>\n<|user|>\nWhat is a class?<|endoftext|>\n<|assistant|>\n"
        "⟦A class is a kind of object.<|endoftext|>⟧\n<|user|>\nThanks<|endoftext|>\n<|assistant|>\n"
        "⟦You are welcome.<|endoftext|>⟧\n"
    )
    assert f"labels, between ⟦ and ⟧:\n{shown}" in capsys.readouterr().out
    kept = json.loads((WorkspaceFolder(Path(run.workspace)).prepared / FILE).read_text())
    assert (kept["text"], len(kept["tokens"])) == (shown, len(kept["loss_mask"]))
    train.main(run)
    tokenizer = AutoTokenizer.from_pretrained(WorkspaceFolder(Path(run.workspace)).result)
    assert tokenizer.chat_template == TEMPLATES["zephyr"]


def test_conversations_are_packed_with_their_masks(tune: Any) -> None:
    dataset = {"chatTemplate": {"name": "zephyr"}}
    whole, packed = (
        tune(packing, FORMS["messages"], dataset=dataset, training=COURSE | {"packing": packing, "maxLength": 256})
        for packing in ("none", "isolated")
    )
    counts = []
    for run in (whole, packed):
        prepare.main(run)
        rows = load_from_disk(read_prepared(run).dataset_path)["train"]
        counts.append((sum(map(len, rows["input_ids"])), sum(map(sum, rows["loss_mask"]))))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("inputs", ["a prompt", "messages"])
def test_an_adapter_answers_with_the_template_of_its_training(
    inputs: str, tune: Any, make_generate_run: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base model has no template. What is written equals PEFT's answer to what transformers makes of it."""
    run = tune(
        "job", FORMS["messages"], dataset={"chatTemplate": {"name": "zephyr"}}, method={"type": "lora", "rank": 4}
    )
    prepare.main(run)
    train.main(run)
    adapter = WorkspaceFolder(Path(run.workspace)).result
    asked = CHATS[0][1:2]
    (tmp_path / "asked.jsonl").write_text(json.dumps({"prompt": asked}) + "\n")
    given = {
        "a prompt": {"rows": [{"prompt": asked[0]["content"]}]},
        "messages": {"dataset": {"files": [str(tmp_path / "asked.jsonl")]}},
    }
    answer = make_generate_run(
        inputs=given[inputs], adapters=[{"path": str(adapter)}], text={"chat": True, "maxNewTokens": 8}
    )
    generate_shards(answer, monkeypatch, prepare.main)
    (line,) = result_lines(answer)

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert line["prompt"] == tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).eval()
    ids = tokenizer(line["prompt"], add_special_tokens=False, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert line["text"] == tokenizer.decode(written, skip_special_tokens=True)


def test_the_example_is_learnt(tune: Any, tiny_model: Path) -> None:
    spec = yaml.safe_load((EXAMPLES / "finetune-chat.yaml").read_text())["spec"]
    run = tune(
        "example",
        FORMS["messages"],
        dataset={"chatTemplate": {"name": "zephyr"}, "evalFraction": 0.25},
        method=spec["method"],
        training=spec["training"] | {"maxSteps": 1, "maxLength": 256},
    )
    prepare.main(run)
    message = train.main(run)
    assert message.metrics is not None
    assert {"evalLoss", "evalLossBefore"} <= message.metrics.keys()
