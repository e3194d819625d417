"""On a GPU: the loss in chunks has the gradients of the plain one, and what each takes for 8,192 tokens.

The figures are of the head alone: 4,096 wide, 128,256 words, bf16. `plain` is what transformers does; `liger` is the
kernel of liger-kernel, where it can be imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig

from luthier_trainer.models.chunked_loss import LinearHead, Sum, chunk_tokens, cross_entropy
from luthier_trainer.tasks.token_loss import TokenLoss

TOKENS, VOCABULARY, WIDTH = 8192, 128_256, 4096
CHUNKS = (256, 512, 1024, 2048, 4096)
REPEATS = 4


@dataclass(frozen=True)
class Precision:
    name: str
    autocast: bool
    tolerance: float
    """Of the norm of a gradient."""


@pytest.mark.parametrize(
    "precision",
    [Precision("fp32", autocast=False, tolerance=1e-5), Precision("bf16", autocast=True, tolerance=2e-2)],
    ids=lambda precision: precision.name,
)
def test_gradients_are_those_of_the_plain_loss(precision: Precision, figure: Callable[..., None]) -> None:
    torch.set_float32_matmul_precision("highest")  # a training of another test may have left TF32 on
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(vocab_size=32_000, hidden_size=512, intermediate_size=1024, **sizes)
    ids = torch.randint(32_000, (2, 512), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    labels = torch.where(torch.arange(512, device="cuda") % 3 == 0, -100, ids)
    found = []
    for chunked in (True, None):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).cuda()
        if chunked:
            TokenLoss(model, chunked, tokens=100)
        with torch.autocast("cuda", torch.bfloat16, enabled=precision.autocast):
            loss = model(input_ids=ids, labels=labels, num_items_in_batch=torch.tensor(600)).loss
        loss.backward()
        found.append((loss.item(), {name: weight.grad for name, weight in model.named_parameters()}))
    (ours, of_ours), (plain, of_plain) = found
    worst = max(float((of_ours[name] - of_plain[name]).norm() / of_plain[name].norm()) for name in of_plain)
    figure(loss=ours, plain=plain, largest_difference=worst)
    assert ours == pytest.approx(plain, rel=1e-6 if not precision.autocast else 1e-3)
    assert worst < precision.tolerance


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.float(), targets, reduction="sum")


def in_chunks(tokens: int, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return cross_entropy(Sum(partial(LinearHead, hidden.dtype), tokens), hidden, targets, [weight])[0]


def losses() -> dict[str, Callable[..., torch.Tensor]]:
    found: dict[str, Callable[..., torch.Tensor]] = {"plain": plain}
    found |= {f"chunks of {tokens}": partial(in_chunks, tokens) for tokens in CHUNKS}
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    except ImportError:
        return found
    kernel = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return found | {"liger": lambda hidden, weight, targets: kernel(weight, hidden, targets)}


@pytest.mark.parametrize("learns", [False, True], ids=["frozen head", "head that learns"])
def test_time_and_memory_beside_the_plain_loss(learns: bool, figure: Callable[..., None]) -> None:
    hidden = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH, device="cuda", dtype=torch.bfloat16) * 0.02).requires_grad_(learns)
    targets = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    measured = {}
    for name, loss in losses().items():
        seconds = []
        for _ in range(REPEATS):
            hidden.grad = weight.grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            loss(hidden, weight, targets).backward()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
            peak = torch.cuda.max_memory_allocated() - before
        measured[name] = {"ms": round(1000 * min(seconds[1:]), 2), "gib": round(peak / 2**30, 3)}
    default = f"chunks of {chunk_tokens(VOCABULARY, 'cuda')}"
    figure(learns=learns, default=default, **measured)
    ours = measured["chunks of 1024"]
    assert ours["gib"] < measured["plain"]["gib"] / 2
