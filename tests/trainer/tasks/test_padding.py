"""The loss of a row does not depend on the rows beside it in a batch, nor on the side on which the tokenizer pads."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from prepared_workspace import prepared_run
from torch.nn.functional import cross_entropy
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    FNetConfig,
    FNetForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
)

from luthier_api.finetune import FineTuneJobSpec
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.models.processors import read_tokenizer
from luthier_trainer.tasks import texts
from luthier_trainer.tasks.base import TrainingContext
from luthier_trainer.tasks.table import TASKS
from luthier_trainer.tasks.token_loss import TokenLoss
from luthier_trainer.training import main as train

LENGTHS = (3, 40, 7, 21, 12, 5, 33, 18)
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
OPT = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Case:
    name: str
    task: str
    model_class: Any
    config_class: Any
    sizes: dict[str, Any]


FAMILIES = [
    Case(
        name="gpt2",
        task="causal-lm",
        model_class=GPT2LMHeadModel,
        config_class=GPT2Config,
        sizes=GPT2,
    ),
    Case(
        name="opt",
        task="causal-lm",
        model_class=OPTForCausalLM,
        config_class=OPTConfig,
        sizes=OPT,
    ),
    Case(
        name="llama",
        task="causal-lm",
        model_class=LlamaForCausalLM,
        config_class=LlamaConfig,
        sizes=BERT,
    ),
    Case(
        name="bert decoder",
        task="causal-lm",
        model_class=BertLMHeadModel,
        config_class=BertConfig,
        sizes=BERT | {"is_decoder": True},
    ),
    Case(
        name="roberta decoder",
        task="causal-lm",
        model_class=RobertaForCausalLM,
        config_class=RobertaConfig,
        sizes=BERT | {"is_decoder": True},
    ),
    Case(
        name="bert classifier",
        task="text-classification",
        model_class=BertForSequenceClassification,
        config_class=BertConfig,
        sizes=BERT,
    ),
    Case(
        name="roberta classifier",
        task="text-classification",
        model_class=RobertaForSequenceClassification,
        config_class=RobertaConfig,
        sizes=BERT,
    ),
    Case(
        name="gpt2, its last token",
        task="text-classification",
        model_class=GPT2ForSequenceClassification,
        config_class=GPT2Config,
        sizes=GPT2,
    ),
    Case(
        name="llama, its last token",
        task="text-classification",
        model_class=LlamaForSequenceClassification,
        config_class=LlamaConfig,
        sizes=BERT,
    ),
]
SIDES = ["left", "right"]


@pytest.fixture(scope="module")
def tokenizers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    """Padding side → a tokenizer that was published with it."""
    found = {}
    for side in SIDES:
        folder = tmp_path_factory.mktemp(side)
        AutoTokenizer.from_pretrained(tiny_model, padding_side=side).save_pretrained(folder)
        found[side] = read_tokenizer(folder, "spec.model")
    return found


def encoded(task: str, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """Rows of `LENGTHS` tokens, as `prepare` leaves them."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(10, len(tokenizer), (length,), generator=generator).tolist() for length in LENGTHS]
    if task == "causal-lm":
        return [{"input_ids": ids, "length": len(ids)} for ids in rows]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 2} for i, ids in enumerate(rows)]


def measured(
    task: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, size: int, **training: Any
) -> tuple[float, float]:
    """(loss that training minimises, loss of the evaluation) over all rows, in batches of `size`."""
    rows = encoded(task, tokenizer)
    spec = {"task": task, "model": {"path": "unused"}, "dataset": {"files": ["unused.jsonl"]}, "training": training}
    context = TrainingContext(FineTuneJobSpec.model_validate(spec), Path("unused"), tokenizer)
    model = copy.deepcopy(model)
    setup = TASKS[task].trainer(context, model)
    loss, metrics = setup.options.get("compute_loss_func"), setup.options["compute_metrics"]
    items = sum(LENGTHS) - len(LENGTHS) if task == "causal-lm" else len(LENGTHS)
    minimised, reduced, labels = 0.0, [], []
    for start in range(0, len(rows), size):
        batch = setup.collator(rows[start : start + size])
        outputs = model(**batch) if loss else model(**batch, num_items_in_batch=torch.tensor(items))
        minimised += (
            loss(outputs, batch["labels"], num_items_in_batch=torch.tensor(items)) if loss else outputs.loss
        ).item()
        with torch.no_grad():
            outputs = model(**batch)
        reduced.append(setup.options["preprocess_logits_for_metrics"](outputs.logits, batch["labels"]))
        labels += batch["labels"].flatten().tolist()
    gathered = type("Gathered", (), {"predictions": torch.cat(reduced), "label_ids": torch.tensor(labels)})
    return minimised, metrics(gathered, compute_result=True)["loss"]


def made(case: Case, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = case.model_class(
        case.config_class(
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, max_position_embeddings=64, **case.sizes
        )
    ).eval()
    model.loss_type = "ForCausalLM" if case.task == "causal-lm" else model.loss_type
    with torch.no_grad():
        for weight in model.parameters():  # positions as different as a trained model's
            weight.copy_(torch.randn_like(weight) * 0.3)
    return model


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_the_loss_does_not_depend_on_the_batch(
    case: Case, side: str, tokenizers: dict[str, PreTrainedTokenizerBase]
) -> None:
    tokenizer = tokenizers[side]
    model = made(case, tokenizer)
    alone = measured(case.task, model, tokenizer, size=1)
    assert alone[0] == pytest.approx(alone[1], abs=1e-4)
    assert measured(case.task, model, tokenizer, size=8) == pytest.approx(alone, abs=1e-4)
    assert measured(case.task, model, tokenizer, size=3) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case.name)
def test_smoothed_labels_are_those_of_torch(case: Case, tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    """Over all labels of a step, whatever its batches are; the evaluation measures without smoothing."""
    tokenizer = tokenizers["right"]
    model = made(case, tokenizer)
    plain = measured(case.task, model, tokenizer, size=8)[1]
    losses = []
    for row in encoded(case.task, tokenizer):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        labels = torch.tensor(row["labels"] if "labels" in row else row["input_ids"][1:]).reshape(-1)
        logits = logits.reshape(-1, logits.shape[-1])[: len(labels)]
        losses.append(cross_entropy(logits, labels, label_smoothing=0.2, reduction="none"))
    expect = torch.cat(losses).mean().item()
    assert expect != pytest.approx(plain, rel=1e-4)
    for size in (8, 3):
        found = measured(case.task, model, tokenizer, size, labelSmoothing=0.2)
        assert found == pytest.approx((expect, plain), rel=2e-5)


def test_smoothing_leaves_what_a_model_adds_to_its_loss(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers["right"]
    torch.manual_seed(0)
    sizes = BERT | {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "router_aux_loss_coef": 0.5}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, output_router_logits=True)).eval()
    ids = torch.tensor([encoded("causal-lm", tokenizer)[1]["input_ids"]])
    plain = model(input_ids=ids, labels=ids)
    TokenLoss(model, chunked=True, epsilon=0.2)
    smoothed = model(input_ids=ids, labels=ids)
    expect = cross_entropy(plain.logits[0, :-1], ids[0, 1:], label_smoothing=0.2) + 0.5 * plain.aux_loss
    assert plain.aux_loss > 1
    assert smoothed.loss.item() == pytest.approx(expect.item(), abs=1e-5)


def test_a_model_that_sees_padding_says_so(
    tokenizers: dict[str, PreTrainedTokenizerBase], make_run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """No padding would be right for it; the user may choose that."""
    tokenizer = tokenizers["right"]
    torch.manual_seed(0)
    config = FNetConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=64,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = FNetForSequenceClassification(config).eval()
    alone, together = (measured("text-classification", model, tokenizer, size)[0] for size in (1, 8))
    assert alone != pytest.approx(together, abs=1e-4)
    for micro, said in ((None, True), (1, False)):
        training = {"maxLength": 64, "batchSize": 4} | ({"microBatchSize": micro} if micro else {})
        texts.check(config, tokenizer, make_run(task="text-classification", training=training).spec)
        assert capsys.readouterr().out.startswith("spec.model: fnet does not mask padding") is said


def test_the_result_keeps_the_side_of_its_tokenizer(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerBase], tiny_model: Path
) -> None:
    from datasets import Dataset, DatasetDict

    tokenizer = tokenizers["left"]
    base = tmp_path / "model"
    LlamaForCausalLM.from_pretrained(tiny_model).save_pretrained(base)
    tokenizer.save_pretrained(base)
    rows = encoded("causal-lm", tokenizer)
    run = prepared_run(tmp_path / "job", base, DatasetDict(train=Dataset.from_list(rows)), training={"maxSteps": 1})
    train.main(run)
    assert AutoTokenizer.from_pretrained(WorkspaceFolder(Path(run.workspace)).result).padding_side == "left"
