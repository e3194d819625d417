"""The loss in chunks against the plain one: CPU seconds and memory, for several vocabularies, in the same process.

`python tests/perf/loss.py` prints one JSON document. Memory is the sum of all tensors that the loss and its backward
pass hold at once, beside what they are given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

from luthier_trainer.models.chunked_loss import LinearHead, Sum, chunk_tokens, cross_entropy
from luthier_trainer.models.step_trace import Ledger

ROUNDS = 3
LIMIT = 1.03  # times the CPU seconds of the plain loss
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Size:
    vocabulary: int
    width: int
    tokens: int
    learns: bool
    """Whether the head does, as in a training of all weights."""


SIZES = [
    Size(vocabulary=2_048, width=192, tokens=1024, learns=False),
    Size(vocabulary=2_048, width=192, tokens=1024, learns=True),
    Size(vocabulary=32_000, width=128, tokens=512, learns=False),
    Size(vocabulary=32_000, width=128, tokens=512, learns=True),
    Size(vocabulary=128_256, width=64, tokens=512, learns=False),
    Size(vocabulary=128_256, width=64, tokens=512, learns=True),
]


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As transformers computes it."""
    return functional.cross_entropy(functional.linear(hidden, weight).float(), targets, reduction="sum")


def in_chunks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    what = Sum(partial(LinearHead, hidden.dtype), chunk_tokens(len(weight), "cpu"))
    return cross_entropy(what, hidden, targets, [weight])[0]


def measured(loss: Loss, *given: torch.Tensor) -> tuple[float, int]:
    """(CPU seconds, bytes) of a loss and its gradients."""
    for tensor in given:
        tensor.grad = None
    began = time.process_time()
    loss(*given).backward()
    seconds = time.process_time() - began
    for tensor in given:
        tensor.grad = None
    with Ledger(given, alignment=1) as ledger:
        loss(*given).backward()
    return seconds, max(size for size, _ in ledger.moments)


def compared(size: Size) -> dict[str, Any]:
    torch.manual_seed(0)
    hidden = torch.randn(size.tokens, size.width).requires_grad_()
    weight = (torch.randn(size.vocabulary, size.width) * 0.05).requires_grad_(size.learns)
    targets = torch.randint(size.vocabulary, (size.tokens,))
    rounds = [
        (measured(in_chunks, hidden, weight, targets), measured(plain, hidden, weight, targets)) for _ in range(ROUNDS)
    ]
    ours, theirs = (min(seconds for seconds, _ in runs) for runs in zip(*rounds, strict=True))
    (_, our_bytes), (_, their_bytes) = rounds[0]
    return {
        "vocabulary": size.vocabulary,
        "tokens": size.tokens,
        "head_learns": size.learns,
        "cpu_seconds": [round(ours, 4), round(theirs, 4)],
        "ratio": round(ours / theirs, 3),
        "mib": [round(our_bytes / 2**20, 1), round(their_bytes / 2**20, 1)],
        "memory_ratio": round(our_bytes / their_bytes, 3),
    }


def main() -> dict[str, Any]:
    torch.set_num_threads(1)
    return {"limit": LIMIT, "sizes": [compared(size) for size in SIZES]}


if __name__ == "__main__":
    print(json.dumps(main(), indent=1))
