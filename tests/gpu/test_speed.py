"""What makes a training fast, on a GPU: it computes the same, and how much faster and smaller it is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from luthier_trainer.models import varlen
from luthier_trainer.models.attention import documents
from luthier_trainer.runtime.devices import use_tf32
from luthier_trainer.training import compiling, stochastic_rounding

Figure = Callable[..., None]
LENGTHS = [[700, 300, 24], [500, 524]]
BILLION = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 16_384,
}
"""About 0.8 billion weights."""
ROW = 8192  # tokens
DOCUMENTS = 16


def model_of(config: Any, attention: str) -> Any:
    varlen.register()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    return model.train()


def batch_of(lengths: list[list[int]], vocabulary: int, tells_documents: bool) -> dict[str, Any]:
    """Packed rows of random tokens, as `TokenCollator` makes them."""
    torch.manual_seed(1)
    rows, length = len(lengths), sum(lengths[0])
    ids = torch.randint(0, vocabulary, (rows, length))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    batch: dict[str, Any] = {"input_ids": ids, "labels": ids, "position_ids": positions, "use_cache": False}
    batch |= documents(lengths) if tells_documents else {}
    return {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def learn(model: Any, batch: dict[str, Any]) -> float:
    loss = model(**batch).loss
    loss.backward()
    return float(loss.item())


def seconds(step: Callable[[], Any], repeats: int = 5) -> float:
    """Median of some calls, after one that does not count."""
    step()
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)


KINDS = {
    "grouped heads": LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
    ),
    "a window": MistralConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        sliding_window=100,
    ),
    "heads of 20": LlamaConfig(
        vocab_size=1000,
        hidden_size=160,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_varlen_computes_what_a_mask_does(kind: str, figure: Figure) -> None:
    """Losses and gradients of two packed rows; the measure is how far bf16 is from fp32 with a mask."""
    config = KINDS[kind]
    found = {}
    for name, attention, dtype in (
        ("exact", "sdpa", torch.float32),
        ("mask", "sdpa", torch.bfloat16),
        ("varlen", varlen.NAME, torch.bfloat16),
    ):
        model = model_of(config, attention).to(dtype)
        loss = learn(model, batch_of(LENGTHS, config.vocab_size, attention == varlen.NAME))
        found[name] = (loss, torch.cat([weight.grad.flatten().double() for weight in model.parameters()]))
    scale = found["exact"][1].norm()
    off = {name: float((found[name][1] - found["exact"][1]).norm() / scale) for name in ("mask", "varlen")}
    figure(loss={name: value[0] for name, value in found.items()}, gradients_off=off)
    assert found["varlen"][0] == pytest.approx(found["exact"][0], abs=5e-3)
    assert off["varlen"] < 1.5 * off["mask"] + 1e-3


def test_varlen_keeps_documents_apart() -> None:
    """Another first document changes nothing in the others, to the last bit."""
    config = KINDS["grouped heads"]
    model = model_of(config, varlen.NAME).eval()
    batch = batch_of(LENGTHS, config.vocab_size, tells_documents=True)
    with torch.no_grad():
        before = model(**batch).logits
        changed = batch | {"input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, : LENGTHS[0][0]] = 7
        after = model(**changed).logits
    begin = LENGTHS[0][0]
    assert torch.equal(before[0, begin:], after[0, begin:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :begin], after[0, :begin])


def test_packed_rows_without_a_mask(figure: Figure) -> None:
    """A row of 8,192 tokens with 16 documents, 0.8 billion weights in bf16, activations recomputed."""
    config = LlamaConfig(**BILLION)
    found: dict[str, Any] = {}
    for attention in ("sdpa", varlen.NAME):
        model = model_of(config, attention)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        batch = batch_of([[ROW // DOCUMENTS] * DOCUMENTS], config.vocab_size, attention == varlen.NAME)
        torch.cuda.reset_peak_memory_stats()
        taken = seconds(lambda model=model, batch=batch: learn(model, batch), repeats=3)
        found[attention] = {"tokens_per_second": ROW / taken, "peak_bytes": torch.cuda.max_memory_allocated()}
        del model, batch
        torch.cuda.empty_cache()
    figure(**found)
    assert found[varlen.NAME]["peak_bytes"] <= found["sdpa"]["peak_bytes"]


def test_weights_in_bf16_take_the_steps_of_fp32(figure: Figure) -> None:
    """200 million weights; small updates, which plain bf16 loses."""
    size, updates, rate = 200_000_000, 20, 1e-5
    weight = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    weight.grad = torch.ones_like(weight)
    group = {"params": [weight], "weight_decay": 0.0}
    ours = stochastic_rounding.AdamW([group], rate, (0.9, 0.999), 1e-8, seed=1)
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    ours.step()
    beside = torch.cuda.max_memory_allocated() - held - 4 * size
    for _ in range(updates - 1):
        ours.step()
    moved = 1 - weight.detach().double().mean().item()
    plain = torch.nn.Parameter(torch.ones(size, dtype=torch.float32, device="cuda"))
    plain.grad = torch.ones_like(plain)
    fused = torch.optim.AdamW([plain], lr=rate, weight_decay=0.0, fused=True)
    figure(
        moved=moved,
        bytes_beside=beside,
        seconds_a_billion={"bf16 at random": seconds(ours.step) * 5, "fp32 fused": seconds(fused.step) * 5},
    )
    assert moved == pytest.approx(updates * rate, rel=0.02)
    assert beside < 2 << 30


def test_blocks_that_are_compiled(figure: Figure) -> None:
    """0.8 billion weights in bf16, rows of 8,192 tokens, by varlen; compiled in their places."""
    config = LlamaConfig(**BILLION | {"num_hidden_layers": 8})
    found, losses = {}, {}
    for name in ("plain", "compiled"):
        model = model_of(config, varlen.NAME)
        batch = batch_of([[ROW // DOCUMENTS] * DOCUMENTS], config.vocab_size, tells_documents=True)
        begin = time.perf_counter()
        if name == "compiled":
            assert compiling.compile_blocks(model) == config.num_hidden_layers
        losses[name] = learn(model, batch)
        first = time.perf_counter() - begin
        torch.cuda.reset_peak_memory_stats()
        taken = seconds(lambda model=model, batch=batch: learn(model, batch), repeats=3)
        peak = torch.cuda.max_memory_allocated()
        found[name] = {"tokens_per_second": ROW / taken, "peak_bytes": peak, "first_step_seconds": first}
        del model, batch
        torch.cuda.empty_cache()
    figure(**found, losses=losses)
    assert losses["compiled"] == pytest.approx(losses["plain"], abs=5e-3)


def test_products_in_tf32(figure: Figure) -> None:
    """A product of 8,192³ in fp32 is off by the rounding of its inputs."""
    left, right = (torch.randn(8192, 8192, device="cuda") for _ in range(2))
    taken, results = {}, {}
    try:
        for uses in (False, True):
            assert use_tf32(uses, "fp32", cpu=False) == uses
            results[uses] = left @ right
            taken[uses] = seconds(lambda: left @ right)
    finally:
        torch.set_float32_matmul_precision("highest")
    off = float((results[True] - results[False]).abs().mean() / results[False].abs().mean())
    figure(teraflops={"fp32": 2 * 8192**3 / taken[False] / 1e12, "tf32": 2 * 8192**3 / taken[True] / 1e12}, off=off)
    assert 1e-5 < off < 1e-2


def test_eight_bits_and_bf16(figure: Figure) -> None:
    """bitsandbytes' AdamW with weights in bf16: the same steps, and no more memory than planned."""
    import bitsandbytes

    size, updates, rate = 100_000_000, 20, 1e-5
    weight = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    weight.grad = torch.ones_like(weight)
    kind = stochastic_rounding.rounding(bitsandbytes.optim.AdamW8bit)
    ours = kind([{"params": [weight], "weight_decay": 0.0}], seed=1, lr=rate)
    for _ in range(updates):
        ours.step()
    moved = 1 - weight.detach().double().mean().item()
    figure(moved=moved, seconds_a_billion=seconds(ours.step) * 10)
    assert moved == pytest.approx(updates * rate, rel=0.05)
