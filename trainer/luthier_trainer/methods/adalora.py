"""AdaLoRA (arXiv:2303.10512): matrices of low rank that share a budget of ranks, by how much each rank matters.

PEFT (0.21) leaves three things to the training: it has to be told of each update, its moving averages are part of no
checkpoint, and the penalty that it adds to the loss of each forward pass counts as often as there are micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier_api.method import Method
from luthier_trainer.methods.base import AdapterFamily, Surroundings
from luthier_trainer.methods.lora import targets_of

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

ADAPTER = "default"  # PEFT's name of the only adapter
AVERAGES = ("exp_avg_ipt", "exp_avg_unc")
PATTERN = "rank_pattern"


class AdaLora(AdapterFamily):
    """Matrices B E A of rank `method.initialRank`, of which `method.rank` ranks are left on average."""

    saves_all = True  # PEFT saves the ranks that are left
    state_weight_bytes = 12  # the importance of each weight, its mean and its deviation, in fp32

    def config(self, method: Method, around: Surroundings) -> PeftConfig:
        from peft import AdaLoraConfig

        return AdaLoraConfig(
            init_r=method.initial_rank,
            target_r=method.rank,
            lora_alpha=method.alpha,
            lora_dropout=method.dropout,
            tinit=int(method.initial_fraction * around.steps),
            tfinal=int(method.final_fraction * around.steps),
            total_step=around.steps,
            orth_reg_weight=method.orthogonal_weight,
            target_modules=targets_of(method, around),
            layers_to_transform=method.layers,
            task_type=around.task_type,
            modules_to_save=around.whole or None,
            exclude_modules=around.excluded,
        )

    def shapes(self, method: Method, name: str, shape: tuple[int, int]) -> list[tuple[int, ...]]:
        outputs, inputs = shape
        rank = method.initial_rank
        return [(outputs, rank), (rank, inputs), (rank, 1)]

    def course(self, adapted: Any, method: Method) -> Allocation:
        return Allocation(adapted)


class Allocation:
    """Distributes the budget of ranks after each update."""

    def __init__(self, adapted: Any) -> None:
        """From now on the loss of `adapted` is without the penalty, which `penalty` returns."""
        self._tuner = adapted.base_model
        self._config = self._tuner.peft_config[ADAPTER]
        self._allocator = self._tuner.rankallocator
        self._pattern: dict[str, list[bool]] | None = None
        model = self._tuner.model
        self._tuner.forward = lambda *args, **options: model(*args, **options)

    def penalty(self) -> torch.Tensor:
        """Return the weighted mean of |A A' - 1| and |B' B - 1| over the matrices, Frobenius norms, a scalar."""
        import torch

        norms = []
        for name, weight in self._tuner.model.named_parameters():
            if f"lora_A.{ADAPTER}" in name or f"lora_B.{ADAPTER}" in name:
                product = weight @ weight.T if "lora_A" in name else weight.T @ weight
                norms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        return self._config.orth_reg_weight * torch.stack(norms).mean()

    def after_update(self, step: int) -> None:
        # What `rank_pattern` holds, PEFT leaves out of what it saves: in the training it is here instead.
        self._config.rank_pattern = self._pattern
        self._tuner.update_and_allocate(step)
        self._pattern, self._config.rank_pattern = self._config.rank_pattern, None

    def state(self) -> dict[str, torch.Tensor]:
        import torch

        kept = {f"{part}:{name}": of for part in AVERAGES for name, of in getattr(self._allocator, part).items()}
        pattern = {f"{PATTERN}:{name}": torch.tensor(left) for name, left in (self._pattern or {}).items()}
        return kept | pattern

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        import torch

        devices = {name: weight.device for name, weight in self._tuner.model.named_parameters()}
        found: dict[str, dict[str, Any]] = {part: {} for part in (*AVERAGES, PATTERN)}
        for key, tensor in state.items():
            part, _, name = key.partition(":")
            found[part][name] = tensor.tolist() if part == PATTERN else tensor.to(devices[name])
        for part in AVERAGES:
            setattr(self._allocator, part, found[part])
        # Of these PEFT keeps the last value alone, and asks by them whether averages have begun.
        self._allocator.ipt = {name: torch.zeros_like(tensor) for name, tensor in found[AVERAGES[0]].items()}
        self._pattern = found[PATTERN] or None

    def finish(self) -> None:
        self._config.rank_pattern = self._pattern
