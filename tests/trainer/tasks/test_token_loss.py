"""The loss that computes the logits of some tokens at a time has the values and gradients of plain transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer.architectures import VOCABULARY, tiny_config, tiny_model_of
from transformers import AutoConfig, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedModel

from luthier_trainer.tasks.batches import IGNORED
from luthier_trainer.tasks.token_loss import TokenLoss, why_whole

ROWS, LENGTH, CHUNK, ITEMS = 2, 24, 7, 40  # ITEMS: labels of a step that has other micro-batches, too
Options = dict[str, Any]


@dataclass(frozen=True)
class Case:
    name: str
    model_type: str = "llama"
    config: Options = field(default_factory=dict)
    adapter: Options | None = None
    """Of PEFT; None: all weights learn."""
    smoothing: float = 0.0
    packed: bool = False
    chunked: bool = True
    """Whether the logits of all tokens never exist."""


CASES = [
    Case("a matrix of its own"),
    Case("tied to the embedding", config={"tie_word_embeddings": True}),
    Case("packed", packed=True),
    Case("label smoothing", smoothing=0.2),
    Case("a bias", model_type="phi"),
    Case("capped logits", model_type="gemma2", config={"final_logit_softcapping": 0.5}),
    Case("capped and smoothed", model_type="gemma2", config={"final_logit_softcapping": 0.5}, smoothing=0.2),
    Case("multiplied logits", model_type="cohere", config={"logit_scale": 4.0}),
    Case("divided logits", model_type="granite", config={"logits_scaling": 0.25}),
    Case("experts and their balance", model_type="mixtral", config={"output_router_logits": True}),
    Case("layers before the head", model_type="bert"),
    Case("a recurrence", model_type="mamba"),
    Case("a loss of its own", model_type="bart"),
    Case("the head in parts", model_type="prophetnet", chunked=False),
    Case("an adapter", adapter={"target_modules": "all-linear"}),
    Case("an adapter on the head", adapter={"target_modules": ["q_proj", "lm_head"]}),
    Case("DoRA on the head", adapter={"target_modules": ["lm_head"], "use_dora": True}),
    Case("a head that learns whole", adapter={"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    Case("new tokens", adapter={"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 6]}}),
    Case(
        "new tokens of both",
        config={"tie_word_embeddings": True},
        adapter={"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 6]}},
    ),
    Case("biases", model_type="phi", adapter={"target_modules": ["q_proj"], "bias": "all"}),
]


def batch_of(case: Case) -> Options:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[0, :7] = labels[1, -4:] = IGNORED
    beside = (
        {"position_ids": torch.arange(LENGTH).remainder(10)[None].repeat(ROWS, 1)}
        if case.packed
        else {"attention_mask": torch.ones_like(ids)}
    )
    return {"input_ids": ids, "labels": labels, "use_cache": False, **beside}


def model_of(case: Case) -> tuple[PreTrainedModel, Any]:
    """(the model, with its adapter): the same weights each time, no dropout, and adapters that change something."""
    base = copy.deepcopy(tiny_model_of(case.model_type, **case.config))
    model: Any = base
    if case.adapter is not None:
        torch.manual_seed(0)
        model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **case.adapter))
        for name, weight in model.named_parameters():
            if "lora_B" in name or "delta" in name:
                torch.nn.init.normal_(weight, std=0.1)
    return base, model.eval()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def plain(case: Case, batch: Options) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients with all logits at once, from what the model returns without labels, by torch alone."""
    _, model = model_of(case)
    given = {key: value for key, value in batch.items() if key != "labels"}
    outputs = model(**given)
    losses = cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1).float(),
        batch["labels"][:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
        label_smoothing=case.smoothing,
    )
    loss = losses / ITEMS
    if case.config.get("output_router_logits"):
        balance = model(**batch).aux_loss
        assert balance > 1
        loss = loss + model.config.router_aux_loss_coef * balance
    loss.backward()
    return loss.item(), gradients(model)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_and_gradients_are_those_of_all_logits_at_once(case: Case) -> None:
    batch = batch_of(case)
    expect, of_weights = plain(case, batch)
    base, model = model_of(case)
    loss = TokenLoss(base, chunked=True, epsilon=case.smoothing, tokens=CHUNK)
    with sizes() as made:
        outputs = model(**batch, num_items_in_batch=torch.tensor(ITEMS))
        outputs.loss.backward()
    assert outputs.loss.item() == pytest.approx(expect, abs=1e-6, rel=1e-6)
    found = gradients(model)
    assert found.keys() == of_weights.keys()
    scale = max(gradient.abs().max() for gradient in of_weights.values())
    for name, gradient in of_weights.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-5, atol=float(1e-5 * gradient.abs().max() + 1e-8 * scale)
        )

    assert (loss.computed_for == []) == case.chunked
    # No tensor has an entry for each token and each word: not in the forward pass, not in the backward pass.
    assert (max(made()) <= CHUNK) == case.chunked
    assert outputs.logits is None


@contextmanager
def sizes() -> Iterator[Callable[[], list[int]]]:
    """Of all tensors over the vocabulary that operations make: how many rows they have."""
    found: list[int] = [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == VOCABULARY:
                    rows = tensor.numel() // VOCABULARY
                    found.extend([rows] if rows != 32 else [])  # the transposed matrix of the head, of width 32
            return made

    with Watch():
        yield lambda: found


@pytest.mark.parametrize("chunked", [True, False], ids=["in chunks", "at once"])
def test_an_evaluation_gets_the_sums_of_rows(chunked: bool) -> None:
    case = CASES[0]
    batch = batch_of(case)
    base, model = model_of(case)
    TokenLoss(base, chunked, epsilon=0.5, tokens=CHUNK)
    with torch.no_grad():
        outputs = model(**batch)
        logits = model_of(case)[1](**{key: value for key, value in batch.items() if key != "labels"}).logits
    losses = cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
    expect = torch.stack([losses.sum(dim=1), torch.tensor([LENGTH - 7.0, LENGTH - 5.0])], dim=1)
    torch.testing.assert_close(outputs.logits, expect.double(), rtol=1e-6, atol=0)
    assert outputs.loss.item() == pytest.approx(float(losses.sum() / expect[:, 1].sum()))


def test_without_a_label_nothing_is_learnt() -> None:
    base, model = model_of(CASES[0])
    TokenLoss(base, chunked=True)
    batch = batch_of(CASES[0])
    loss = model(**batch | {"labels": torch.full_like(batch["labels"], IGNORED)}, num_items_in_batch=ITEMS).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_autocast_rounds_as_plain_training_does() -> None:
    """In bf16, the error of a gradient against fp32 is that of the logits at once."""
    case = Case("capped", model_type="gemma2", config={"final_logit_softcapping": 0.5})
    batch = batch_of(case)
    _, exact = plain(case, batch)
    errors = []
    for chunked in (True, False):
        base, model = model_of(case)
        TokenLoss(base, chunked, tokens=CHUNK)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**batch, num_items_in_batch=ITEMS).loss
        assert loss.dtype == torch.float32
        loss.backward()
        errors.append([(gradients(model)[name] - exact[name]).norm() / exact[name].norm() for name in exact])
    ours, theirs = (torch.tensor(found).median() for found in errors)
    assert 0 < ours < 1.2 * theirs


@dataclass(frozen=True)
class Kind:
    model_type: str
    why: str | None = None


KINDS = [
    Kind("llama"),
    Kind("gemma2"),
    Kind("cohere"),
    Kind("mixtral"),
    Kind("bart"),
    Kind("mamba"),
    Kind("prophetnet", "prophetnet computes more with its logits than their loss ([])"),
    Kind("mamba2", "could not be tried"),
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.model_type)
def test_prepare_tries_a_small_model(kind: Kind) -> None:
    why = why_whole(tiny_config(kind.model_type))
    assert (why is None) == (kind.why is None)
    assert kind.why is None or kind.why in (why or "")


T5: Options = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART: Options = {
    "d_model": 32,
    **{f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in (("layers", 2), ("ffn_dim", 64))},
    **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
    "max_position_embeddings": 64,
    "dropout": 0.0,
}
BERT: Options = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class PlaceCase:
    """Each logit is for the label at its own place."""

    model_type: str
    config: Options
    task: str = "masked-lm"
    smoothing: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.model_type}, smoothed" if self.smoothing else self.model_type


PLACES = [
    PlaceCase("t5", T5, "seq2seq"),
    PlaceCase("mt5", T5, "seq2seq", smoothing=0.2),
    PlaceCase("bart", BART, "seq2seq"),
    PlaceCase("marian", BART | {"pad_token_id": 1}, "seq2seq", smoothing=0.1),
    PlaceCase("m2m_100", BART, "seq2seq"),
    PlaceCase("bert", BERT),
    PlaceCase("roberta", BERT),
    PlaceCase("distilbert", {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "dropout": 0.0}),
    PlaceCase("albert", BERT | {"embedding_size": 32}),
    PlaceCase("modernbert", {name: BERT[name] for name in (*BERT,)[:4]} | {"pad_token_id": 0}),
]


def placed(case: PlaceCase) -> tuple[Any, Options]:
    """(a model with the same weights each time and without dropout, a batch)"""
    torch.manual_seed(0)
    config = AutoConfig.for_model(case.model_type, vocab_size=VOCABULARY, **case.config)
    kind: Any = AutoModelForMaskedLM if case.task == "masked-lm" else AutoModelForSeq2SeqLM
    model = kind.from_config(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("final_logits_bias"):
            torch.nn.init.normal_(buffer)
    batch = batch_of(CASES[0])
    batch.pop("use_cache")
    if case.task == "seq2seq":
        batch |= {"decoder_input_ids": batch["input_ids"].flip(1), "use_cache": False}
    return model, batch


@pytest.mark.parametrize("case", PLACES, ids=lambda case: case.name)
def test_labels_at_their_own_places(case: PlaceCase) -> None:
    model, batch = placed(case)
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    labels = batch.pop("labels")
    learnt = labels != IGNORED
    labels = torch.where(learnt & (torch.arange(LENGTH) % 3 == 0), logits.argmax(dim=-1), labels)  # which are right
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=case.smoothing)
    (losses.sum() / ITEMS).backward()
    of_weights = gradients(model)
    bare = cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
    right = ((logits.argmax(dim=-1) == labels) & learnt).sum(dim=1)

    model, _ = placed(case)
    loss = TokenLoss(model, True, epsilon=case.smoothing, tokens=CHUNK, shifted=False, counts_right=True)
    with sizes() as made:
        outputs = model(**batch, labels=labels, num_items_in_batch=torch.tensor(ITEMS))
        outputs.loss.backward()
        with torch.no_grad():
            measured = model(**batch, labels=labels).logits
    assert (loss.computed_for, max(made()) <= CHUNK) == ([], True)
    assert outputs.loss.item() == pytest.approx(losses.sum().item() / ITEMS, rel=1e-6)
    assert outputs.logits is None
    found = gradients(model)
    assert found.keys() == of_weights.keys()
    scale = float(max(gradient.abs().max() for gradient in of_weights.values()))
    for name, gradient in of_weights.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=2e-6 * scale)
    assert right.min() >= 5
    expect = torch.stack([bare.double(), learnt.sum(dim=1).double(), right.double()], dim=1)
    torch.testing.assert_close(measured, expect, rtol=1e-6, atol=0)
    assert why_whole(model.config, case.task) is None
