"""What FSDP does in one of two processes, whose partner does nothing: its messages are lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from luthier_trainer.distributed.strategy import divided_over
from luthier_trainer.models import fsdp
from luthier_trainer.runtime.failure import Failure

RANK, RANKS = 1, 2


@pytest.fixture
def second_of_two() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=RANK, world_size=RANKS)
    yield
    dist.destroy_process_group()


def load(folder: Path) -> Any:
    with fsdp.in_shards():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **fsdp.loading_options(RANKS))


def test_a_process_reads_and_keeps_its_own_rows(second_of_two: None, llama: Path) -> None:
    """Of all but the norm after the last block, which is small, and is divided later."""
    model, files = load(llama), load_file(llama / "model.safetensors")
    names = {name for name, weight in model.named_parameters() if isinstance(weight, DTensor)}
    assert {*files} - names == {"model.norm.weight"}
    fsdp.fully_sharded(model, half=False)
    for name, weight in model.named_parameters():
        own = weight.to_local()
        assert torch.equal(own, files[name].chunk(RANKS)[RANK].float()), name
        assert own.untyped_storage().nbytes() == own.nbytes, name
    assert divided_over(model) == RANKS
    assert fsdp.units(model) == 1 + model.config.num_hidden_layers


def test_a_model_that_is_not_divided_is_told_from_one_that_is(llama: Path) -> None:
    assert divided_over(AutoModelForCausalLM.from_pretrained(llama)) == "not model.embed_tokens.weight"


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("recomputing", [False, True])
def test_recomputing_gathers_nothing_again(
    recomputing: bool, adapter: bool, second_of_two: None, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block twice, for its forward and its backward pass, and all else once."""
    model = load(llama)
    layers = model.config.num_hidden_layers
    if adapter:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    fsdp.fully_sharded(model, half=False)
    model.train()
    if recomputing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    gather, gathered = _fsdp_param_group.foreach_all_gather, []

    def counted(*args: Any, **options: Any) -> Any:
        gathered.append(args)
        return gather(*args, **options)

    monkeypatch.setattr(_fsdp_param_group, "foreach_all_gather", counted)
    tokens = torch.arange(8)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert len(gathered) == 2 * layers + 1
    assert all(isinstance(weight.grad, DTensor) for weight in model.parameters() if weight.requires_grad)


def test_a_single_number_cannot_be_divided() -> None:
    with pytest.raises(Failure, match=r"spec\.strategy: fsdp divides the rows of weights, and .* use zero3 or ddp"):
        fsdp.outline(torch.nn.Parameter(torch.tensor(1.0)))
