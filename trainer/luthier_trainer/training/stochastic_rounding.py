"""Optimisers for weights that rest in bf16, without a copy in fp32 (`training.parameterPrecision: bf16`).

bf16 has 8 bits of precision. An update below 1/512 of its weight would be rounded away, step after step: with a
learning rate of full fine-tuning, most of them are. So each new weight is rounded up or down at random, with the
probability that keeps its expected value (arXiv:2010.06192). The computation itself is in fp32.

The random numbers follow from seed and step alone: all processes round alike, and a resumed run goes on in them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

CHUNK = 1 << 24  # weights that are copied to fp32 at once: 64 MiB a copy
LOW_BITS = 1 << 16  # what bf16 lacks of fp32
SEEDS = 1 << 62


def round_at_random(target: torch.Tensor, source: torch.Tensor, random: torch.Generator) -> None:
    """Write `source`, fp32, into `target`, bf16 of the same shape. What bf16 can express stays as it is."""
    noise = torch.empty_like(source, dtype=torch.int32).random_(0, LOW_BITS, generator=random)
    bits = noise.add_(source.view(torch.int32)).bitwise_and_(-LOW_BITS)
    target.copy_(bits.view(torch.float32))


class RoundsAtRandom(torch.optim.Optimizer):
    """A base class: it counts its updates, which a checkpoint holds, and has the random numbers of the present one."""

    _seed: int
    _random: torch.Generator | None = None

    def _begin_update(self) -> None:
        group = self.param_groups[0]
        group["updates"] = group.get("updates", 0) + 1
        device = group["params"][0].device
        if self._random is None:
            self._random = torch.Generator(device)
        self._random.manual_seed((self._seed * 1_000_003 + group["updates"]) % SEEDS)


class AdamW(RoundsAtRandom):
    """AdamW whose weights and moments rest in bf16. `found_inf` withholds an update, as in torch's fused optimisers."""

    _step_supports_amp_scaling = True
    """Whether `found_inf` is known: for `optimizers.withholding`, and by the name of torch."""
    found_inf: torch.Tensor | None = None

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float, seed: int
    ) -> None:
        # By `fused`, torch's loading of a state knows that `step` is on the device.
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "fused": True})
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self._begin_update()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)

    def _update(self, weight: torch.Tensor, group: dict[str, Any]) -> None:
        assert self._random is not None
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        before = state["step"].clone()
        kept = [part.view(-1) for part in (weight, state["exp_avg"], state["exp_avg_sq"])]
        gradient = weight.grad.reshape(-1)
        for begin in range(0, weight.numel(), CHUNK):
            parts = [part[begin : begin + CHUNK] for part in kept]
            new, mean, square = (part.float() for part in parts)
            step = before.clone()
            adamw(
                [new],
                [gradient[begin : begin + CHUNK].float()],
                [mean],
                [square],
                [],
                [step],
                fused=True,
                found_inf=self.found_inf,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            for part, computed in zip(parts, (new, mean, square), strict=True):
                round_at_random(part, computed, self._random)
            state["step"] = step


def rounding(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """Return a class of bitsandbytes with updates that are computed in fp32 and rounded at random."""

    class Rounding(RoundsAtRandom, kind):
        def __init__(self, *args: Any, seed: int, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._seed = seed

        def step(self, closure: Any = None) -> Any:
            self._begin_update()
            return super().step(closure)

        @torch.no_grad()
        def update_step(self, group: dict[str, Any], p: torch.Tensor, gindex: int, pindex: int) -> None:
            copy = torch.nn.Parameter(p.detach().float())
            copy.grad = p.grad.float()
            self.state[copy] = self.state[p]
            super().update_step(group, copy, gindex, pindex)
            del self.state[copy]
            round_at_random(p, copy.detach(), self._random)

    return type(f"Rounding{kind.__name__}", (Rounding,), {})
