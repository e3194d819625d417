"""Rows of the embedding for tokens that a job adds: learnt by an adapter, and there wherever its result is used."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from cases.quick import quick
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from prepared_workspace import losses, prose
from safetensors.torch import load_file, save_file
from trainer.conftest import MakeRun
from trainer.preparing import prepared
from trainer.training.test_resume import stopped_at
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GPTJConfig,
    GPTJForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)
from trl.trainer.utils import add_fused_lm_head

from luthier_api.exitcodes import ExitCode
from luthier_trainer.generation.engines.text import load_model
from luthier_trainer.methods.quantization import settings
from luthier_trainer.models.merge import add_adapters, merge
from luthier_trainer.prepare.main import main as prepare
from luthier_trainer.runtime import notices
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.training import main as train
from luthier_trainer.training import result

START, END = "<|im_start|>", "<|im_end|>"
ROWS, STEPS, RATE = 512, 4, 5e-3
EPSILON = 1e-3  # with a larger one than the default, Adam does not amplify the differences in rounding
CHAT = {"addSpecialTokens": [START, END]}


@pytest.fixture(scope="module")
def tied(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama with one embedding for input and output."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    shutil.copytree(llama, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    return folder


@pytest.fixture(scope="module")
def spare(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama with more rows in its embedding than tokens, as many models are published."""
    folder = tmp_path_factory.mktemp("models") / "spare"
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(ROWS + 1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def chats(paragraphs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 conversations."""
    path = tmp_path_factory.mktemp("rows") / "chats.jsonl"
    texts = [" ".join(text.split()[:12]) for text in prose(paragraphs)[:32]]
    pairs = zip(texts[::2], texts[1::2], strict=True)
    rows = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@dataclass(frozen=True)
class Case:
    name: str
    model: str
    method: dict[str, Any]
    tables: tuple[str, ...]
    """The modules whose rows the adapter has."""
    spec: dict[str, Any] = field(default_factory=dict)
    without_row: int = 2
    plain: bool = True
    """Whether plain PEFT is trained beside it."""


CASES = [
    Case(
        name="LoRA, an output of its own",
        model="llama",
        method={"type": "lora"},
        tables=("lm_head", "model.embed_tokens"),
    ),
    Case(
        name="LoRA, tied",
        model="tied",
        method={"type": "lora"},
        tables=("model.embed_tokens",),
    ),
    Case(
        name="LoRA, a row to spare",
        model="spare",
        method={"type": "lora", "modulesToSave": ["norm"]},
        tables=("lm_head", "model.embed_tokens"),
        without_row=1,
        plain=False,
    ),
    Case(
        name="QLoRA, tied",
        model="tied",
        method={"type": "qlora"},
        tables=("model.embed_tokens",),
        plain=False,
    ),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", quick(CASES, "LoRA, an output of its own", "QLoRA, tied"))
def test_an_adapter_holds_the_rows_of_new_tokens(
    case: Case,
    make_run: MakeRun,
    make_generate_run: MakeRun,
    chats: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base: Path = request.getfixturevalue(case.model)
    trained: dict[str, torch.Tensor] = {}
    write = result.write

    def listening(loop: Any, *arguments: Any) -> None:
        trained["logits"] = logits(loop.model)
        write(loop, *arguments)

    monkeypatch.setattr(result, "write", listening)

    def make(name: str) -> Any:
        return make_run(
            name,
            model={"path": str(base)} | CHAT,
            method=case.method,
            dataset={"files": [str(chats)], "chatTemplate": {"name": "chatml"}},
            training={
                "maxLength": 96,
                "batchSize": 4,
                "maxSteps": STEPS,
                "learningRate": RATE,
                "optimizerOptions": {"epsilon": EPSILON},
            },
        )

    run = make("whole")
    _, data = prepared(run)
    assert any(
        f"2 tokens are new ({START} (512), {END} (513)). {case.without_row} of them had no row" in text
        for text in notices.given()
    )
    assert train.main(run).code == 0
    adapter = tmp_path / "workspace/whole/result"

    weights = load_file(adapter / "adapter_model.safetensors")
    held = {name for name in weights if "token_adapter" in name}
    assert held == {f"base_model.model.{name}.token_adapter.trainable_tokens_delta" for name in case.tables}
    assert all(weights[name].shape == (2, 64) for name in held)
    assert max(weight.numel() for weight in weights.values()) < ROWS * 64  # nowhere a whole embedding

    # What plain PEFT loads, with the tokenizer of the result; what a job with model.job starts from; what a GenerateJob
    # with adapters writes with.
    users = AutoPeftModelForCausalLM.from_pretrained(adapter)
    if case.method["type"] == "qlora":  # where bitsandbytes has other kernels in training
        quantised = AutoPeftModelForCausalLM.from_pretrained(adapter, quantization_config=settings("nf4", "fp32"))
        torch.testing.assert_close(logits(quantised), trained["logits"], rtol=0, atol=5e-3)
    else:
        torch.testing.assert_close(logits(users), trained["logits"])
    merged = AutoModelForCausalLM.from_pretrained(merge(base, adapter, tmp_path / "merged", None, "spec.model.job"))
    torch.testing.assert_close(logits(merged), logits(users))
    assert merged.config.tie_word_embeddings is (case.model == "tied")
    generating = add_adapters(load_model(base, torch.float32, torch.device("cpu")), [adapter], [1.0], "spec.adapters")
    torch.testing.assert_close(logits(generating), logits(users))
    assert AutoTokenizer.from_pretrained(adapter)(END)["input_ids"] == [ROWS + 1]

    if case.plain:
        plain = plain_peft(base, data["train"], tmp_path / "plain")
        assert weights.keys() == plain.keys()
        assert {n for n, w in weights.items() if not torch.allclose(w, plain[n], rtol=1e-5, atol=1e-6)} == set()

    # An attempt that resumes learns the same.
    run = make("stopped")
    prepare(run)
    assert stopped_at(run, 2, monkeypatch).code == 75
    assert train.main(run).code == 0
    resumed = load_file(tmp_path / "workspace/stopped/result/adapter_model.safetensors")
    assert {name for name, weight in weights.items() if not torch.equal(weight, resumed[name])} == set()

    # A GenerateJob takes the adapter's tokenizer.
    notices.forget()
    generate = make_generate_run(
        model={"path": str(base)},
        adapters=[{"path": str(adapter)}],
        inputs={"rows": [{"prompt": f"{START}user"}]},
    )
    prepare(generate)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "workspace/gen/prepared/tokenizer")
    assert tokenizer(f"{START}user")["input_ids"][0] == ROWS
    assert any("spec.adapters[0].path: its tokenizer is used" in text for text in notices.given())


def plain_peft(base: Path, data: Any, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that plain transformers and PEFT learn."""
    set_seed(42)
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(ROWS + 2)
    new = [ROWS, ROWS + 1]
    tokens = {"embed_tokens": new} if model.config.tie_word_embeddings else {"embed_tokens": new, "lm_head": new}
    config = LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM", trainable_token_indices=tokens
    )
    model = get_peft_model(model, config)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=RATE,
            adam_epsilon=EPSILON,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=42,
        ),
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(base), padding="longest"),
        train_dataset=[
            {
                "input_ids": row["input_ids"],
                "attention_mask": [1] * row["length"],
                "labels": [i if on else -100 for i, on in zip(row["input_ids"], row["loss_mask"], strict=True)],
            }
            for row in data
        ],  # type: ignore[arg-type]
    )
    trainer.train()
    return get_peft_model_state_dict(model, save_embedding_layers=False)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Of a turn; [tokens, vocabulary] without rows to spare."""
    was, ids = model.training, torch.tensor([[ROWS, 5, 9, ROWS + 1, 7]])
    found = model.eval()(input_ids=ids).logits[0].float()
    model.train(was)
    return found[..., : ROWS + 2] if found.shape[-1] > ROWS else found


def test_a_classifier_with_new_tokens_loads_in_plain_peft(
    make_run: MakeRun, corpus_rows: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that no row has is said. The rows that are drawn stay as they are, and belong to the result."""
    trained: list[torch.Tensor] = []
    write = result.write
    monkeypatch.setattr(result, "write", lambda loop, *rest: (trained.append(logits(loop.model)), write(loop, *rest)))
    run = make_run(
        task="text-classification",
        model={"path": str(tiny_model)} | CHAT,
        method={"type": "lora"},
        dataset={"files": [str(corpus_rows)]},
        training={"maxLength": 32, "batchSize": 4, "maxSteps": 2},
    )
    prepare(run)
    assert any(f"2 of 2 new tokens occur in no row ({START} (512), {END} (513))" in text for text in notices.given())
    assert train.main(run).code == 0
    adapter = tmp_path / "workspace/job/result"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=2, pad_token_id=1)
    model.resize_token_embeddings(ROWS + 2)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, adapter)), trained[0])


@dataclass(frozen=True)
class Refused:
    name: str
    spec: dict[str, Any]
    message: str


REFUSED = [
    Refused(
        name="the whole embedding, too",
        spec={"method": {"type": "lora", "modulesToSave": ["embed_tokens"]}},
        message="spec.method.modulesToSave[0]: the rows of new tokens of model.embed_tokens are trained by themselves;",
    ),
    Refused(
        name="an adapter on the output, too",
        spec={"method": {"type": "lora", "targetModules": ["q_proj", "lm_head"]}},
        message="spec.method.targetModules[1]: the rows of new tokens of lm_head are trained by themselves;",
    ),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_would_be_trained_twice_is_refused(case: Refused, make_run: MakeRun, tiny_model: Path) -> None:
    with pytest.raises(Failure) as failure:
        prepare(make_run(model={"path": str(tiny_model)} | CHAT, **case.spec))
    assert (failure.value.code, failure.value.message.startswith(case.message)) == (ExitCode.INVALID_SPEC, True)


def test_a_bias_of_the_logits_is_refused(make_run: MakeRun, tiny_model: Path, tmp_path: Path) -> None:
    """PEFT 0.21 leaves it out where it computes logits with single rows."""
    GPTJForCausalLM(GPTJConfig(vocab_size=ROWS, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    with pytest.raises(Failure, match=r"spec\.model\.path: 2 tokens are new\. .* leave out the bias of the logits"):
        prepare(make_run(model={"path": str(tmp_path)} | CHAT, method={"type": "lora"}))


def test_a_model_that_is_trained_whole_gets_the_tokens(
    make_run: MakeRun, tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    run = make_run(
        model={"path": str(tiny_model)} | {"addSpecialTokens": [START, END, "<|pad|>"]},
        method={"type": "full"},
        dataset={"files": [str(chats)], "chatTemplate": {"name": "chatml"}},
        training={"maxLength": 96, "batchSize": 4, "maxSteps": 1},
    )
    prepare(run)
    assert "spec.model.addSpecialTokens: the tokenizer has <|pad|> already, which stay as they are" in notices.given()
    assert train.main(run).code == 0
    folder = tmp_path / "workspace/job/result"
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().num_embeddings == ROWS + 2
    assert AutoTokenizer.from_pretrained(folder)(END)["input_ids"] == [ROWS + 1]


def test_preferences_of_a_model_that_is_trained_whole(
    make_run: MakeRun, tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    """The reference has the rows that were drawn: the first loss is that of equal models, and later ones are below."""
    rows = [row | {"prompt": f"{START}{row['prompt']}{END}"} for row in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(
        task="preference",
        model={"path": str(tiny_model)} | CHAT,
        method={"type": "full"},
        dataset={"files": [str(tmp_path / "pairs.jsonl")], "parseSpecialTokens": True},
        training={"maxLength": 48, "batchSize": 8, "maxSteps": 4, "learningRate": RATE, "logSteps": 1},
    )
    _, data = prepared(run)
    assert all(ROWS in row["prompt_ids"] for row in data["train"])
    assert train.main(run).code == 0
    found = losses(run)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)
    assert found[-1] < found[0] - 0.01


def test_a_reward_model_with_new_tokens_loads_in_plain_peft(
    make_run: MakeRun, tiny_model: Path, pairs: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[torch.Tensor] = []
    write = result.write
    monkeypatch.setattr(result, "write", lambda loop, *rest: (trained.append(logits(loop.model)), write(loop, *rest)))
    rows = [row | {"prompt": f"{START}{row['prompt']}{END}"} for row in pairs]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = make_run(
        task="reward",
        model={"path": str(tiny_model)} | CHAT,
        method={"type": "lora"},
        dataset={"files": [str(tmp_path / "pairs.jsonl")], "parseSpecialTokens": True},
        training={"maxLength": 96, "batchSize": 8, "maxSteps": 2, "learningRate": RATE},
    )
    prepare(run)
    assert train.main(run).code == 0
    adapter = tmp_path / "workspace/job/result"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, pad_token_id=1)
    torch.manual_seed(7)
    drawn = torch.randn(2, model.config.hidden_size)
    model.resize_token_embeddings(ROWS + 2)
    model.get_input_embeddings().weight.data[ROWS:] = drawn  # which the adapter replaces
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, adapter)), trained[0])


def test_trl_cannot_compute_logits_with_rows_of_adapters(tiny_model: Path) -> None:
    """Why preference and grpo refuse them. When TRL can, the rule can go."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokens = {"embed_tokens": [5], "lm_head": [5]}
    adapted: Any = get_peft_model(model, LoraConfig(target_modules=["q_proj"], trainable_token_indices=tokens))
    add_fused_lm_head(adapted.get_base_model())
    ids = torch.tensor([[1, 5, 7]])
    with pytest.raises(AttributeError, match="'TrainableTokensWrapper' object has no attribute 'bias'"):
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
